"""Rotary embedding and attention over paged keys and values in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.ops.reference.common import deliver, wide


def rotary_ref(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """Rotates the first rotary_dim channels of q [T, Hq, D] and k [T, Hkv, D] in place, NeoX pairing."""
    rotary_dim = cos_sin.shape[1]
    half = rotary_dim // 2
    angles = cos_sin[positions.long()]
    cos, sin = angles[:, None, :half], angles[:, None, half:]
    for heads in (q, k):
        first, second = wide(heads[..., :half]), wide(heads[..., half:rotary_dim])
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        heads[..., :rotary_dim] = rotated.to(heads.dtype)


def kv_write_ref(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    rows: Tensor,
    token_rows: Tensor,
    positions: Tensor,
) -> None:
    """Stores k, v [T, Hkv, D] at block_table[rows[token_rows], position // S], position % S."""
    block_size = k_cache.shape[1]
    place = positions.long()
    blocks = block_table[rows[token_rows.long()].long(), place // block_size].long()
    k_cache[blocks, place % block_size] = k
    v_cache[blocks, place % block_size] = v


def paged_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    rows: Tensor,
    query_start: Tensor,
    row_start: Tensor,
    max_query_len: int,
    max_kv_len: int,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Query i of row r sees positions 0 .. row_start[r] + i: q [T, Hq, D] -> [T, Hq, D]."""
    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    repeats = q.shape[1] // num_kv_heads
    result = torch.zeros_like(wide(q))
    bounds, starts = query_start.tolist(), row_start.tolist()
    for index, row in enumerate(rows.tolist()):
        begin, end = bounds[index], bounds[index + 1]
        if end == begin:
            continue
        kv_len = starts[index] + end - begin
        places = torch.arange(kv_len, device=q.device)
        blocks = block_table[row, places // block_size].long()
        keys = wide(k_cache[blocks, places % block_size]).repeat_interleave(repeats, dim=1)
        values = wide(v_cache[blocks, places % block_size]).repeat_interleave(repeats, dim=1)
        scores = torch.einsum("qhd,khd->hqk", wide(q[begin:end]), keys) * scale
        query_places = torch.arange(starts[index], kv_len, device=q.device)
        scores.masked_fill_(places[None, :] > query_places[:, None], float("-inf"))
        result[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return deliver(result, q.dtype, out)
