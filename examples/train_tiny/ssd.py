"""The Mamba-2 scan in its chunked matrix form, differentiable. Knows no layer.

Source: Dao and Gu, "Transformers are SSMs", 2024, section 6 (state space duality). All of it in float32: within a
chunk the decays are exponents of differences of a running sum, each of them <= 0, so nothing overflows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _decay(log_decay: Tensor) -> Tensor:
    """[..., L] log decays -> [..., L, L] with exp(sum of (j, i]) at i >= j, zero above the diagonal."""
    total = log_decay.cumsum(-1)
    span = total[..., :, None] - total[..., None, :]
    is_future = torch.ones(span.shape[-2:], dtype=torch.bool, device=span.device).triu(1)
    return span.masked_fill(is_future, -torch.inf).exp()


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
    """y[b, t] = C_t . S_t with S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t, from S = 0.

    x [batch, T, H, P], dt [batch, T, H] (after softplus), A [H] (negative), B and C [batch, T, G, N]; returns
    [batch, T, H, P]. All float32.
    """
    batch, num_tokens, num_heads, head_dim = x.shape
    num_groups = B.shape[2]
    pad = -num_tokens % chunk_size
    num_chunks, per_group = (num_tokens + pad) // chunk_size, num_heads // num_groups

    def chunked(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, pad))
        return t.reshape(batch, num_chunks, chunk_size, *t.shape[2:])

    # b batch, c chunk, l and s positions of a chunk, g group, h head of a group, p channel, n state
    log_decay = (
        chunked(dt * A).view(batch, num_chunks, chunk_size, num_groups, per_group).permute(0, 3, 4, 1, 2)
    )
    inputs = chunked(x * dt[..., None]).view(batch, num_chunks, chunk_size, num_groups, per_group, head_dim)
    B, C = chunked(B), chunked(C)
    total = log_decay.cumsum(-1)

    scores = torch.einsum("bclgn,bcsgn->bgcls", C, B)[:, :, None] * _decay(log_decay)
    within = torch.einsum("bghcls,bcsghp->bclghp", scores, inputs)

    to_end = (total[..., -1:] - total).exp().permute(0, 3, 4, 1, 2)
    added = torch.einsum("bclgn,bclghp->bghcpn", B, inputs * to_end[..., None])
    across = _decay(F.pad(total[..., -1], (1, 0)))[..., :-1, 1:]  # state at the start of c: chunks before it
    at_start = torch.einsum("bghcz,bghzpn->bghcpn", across, added)
    before = torch.einsum("bclgn,bghcpn->bclghp", C, at_start) * total.exp().permute(0, 3, 4, 1, 2)[..., None]

    y = (within + before).reshape(batch, num_chunks * chunk_size, num_heads, head_dim)
    return y[:, :num_tokens]
