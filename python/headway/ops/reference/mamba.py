"""The Mamba-2 mixer's recurrences, one token after the other (arXiv 2405.21060, section 3).

Slow and plain: the judge of every faster kernel. In float64 when the inputs are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.ops.records import Snapshots
from headway.ops.reference.common import deliver, silu, wide
from headway.ops.reference.state_rounding import round_state_ref


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    query_start: Tensor,
    row_start: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    *,
    snapshots: Snapshots | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution and silu: x [T, conv_dim], weight [W, conv_dim] -> [T, conv_dim]."""
    width = weight.shape[0]
    result = torch.empty_like(wide(x))
    bounds, starts = query_start.tolist(), row_start.tolist()
    entry_states = [state[slot].clone() for slot in read_slots.tolist()]
    for row, slot in enumerate(write_slots.tolist()):
        begin, end = bounds[row], bounds[row + 1]
        past = entry_states[row] if starts[row] > 0 else torch.zeros_like(state[slot])
        columns = torch.cat([past, x[begin:end].to(state.dtype)])
        taps = wide(columns).unfold(0, width, 1) if end > begin else None  # [tokens, conv_dim, W]
        if taps is not None:
            total = (taps * wide(weight).T).sum(-1)
            result[begin:end] = silu(total if bias is None else total + wide(bias))
        for num_seen, snapshot_slot in _snapshots_of(row, starts[row], snapshots):
            state[snapshot_slot] = columns[num_seen : num_seen + width - 1]
        state[slot] = columns[columns.shape[0] - (width - 1) :]
    return deliver(result, x.dtype, out)


def ssm_scan_ref(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    query_start: Tensor,
    row_start: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    dt_min: float = 0.0,
    dt_max: float = float("inf"),
    *,
    max_query_len: int = 0,
    snapshots: Snapshots | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """S = exp(A dt) S + dt x B^T, y = S C + D x, token by token: x [T, H, P], B and C [T, G, N] -> [T, H, P]."""
    num_heads, num_groups = x.shape[1], B.shape[1]
    result = torch.zeros_like(wide(x))
    step = step_sizes(wide(dt) + wide(dt_bias), dt_min, dt_max)  # [T, H]
    decay = torch.exp(step * wide(A))
    key = wide(B).repeat_interleave(num_heads // num_groups, dim=1)  # [T, H, N]
    query = wide(C).repeat_interleave(num_heads // num_groups, dim=1)
    bounds, starts = query_start.tolist(), row_start.tolist()
    entry_states = [state[slot].clone() for slot in read_slots.tolist()]
    for row, slot in enumerate(write_slots.tolist()):
        current = entry_states[row] if starts[row] > 0 else torch.zeros_like(state[slot])
        wanted = dict(_snapshots_of(row, starts[row], snapshots))
        for token in range(bounds[row], bounds[row + 1]):
            inflow = (step[token, :, None] * wide(x[token]))[:, :, None] * key[token, :, None, :]
            current = wide(current) * decay[token, :, None, None] + inflow
            result[token] = (current * query[token, :, None, :]).sum(-1) + wide(D)[:, None] * wide(x[token])
            if state.dtype == torch.float16:
                current = round_state_ref(current, starts[row] + token + 1 - bounds[row])
            if token + 1 - bounds[row] in wanted:
                state[wanted[token + 1 - bounds[row]]] = current
        state[slot] = current
    return deliver(result, x.dtype, out)


def _snapshots_of(row: int, start: int, snapshots: Snapshots | None) -> list[tuple[int, int]]:
    """Of one row: how many of its tokens each has seen, and its slot."""
    if snapshots is None:
        return []
    entries = slice(int(snapshots.starts[row]), int(snapshots.starts[row + 1]))
    num_seen = (snapshots.positions[entries] - start).tolist()
    return list(zip(num_seen, snapshots.slots[entries].tolist(), strict=True))


def step_sizes(raw: Tensor, dt_min: float, dt_max: float) -> Tensor:
    """dt = clamp(softplus(raw), dt_min, dt_max), softplus(v) = v above 20."""
    soft = torch.where(raw > 20, raw, torch.log1p(torch.exp(raw.clamp(max=20))))
    return soft.clamp(dt_min, dt_max)
