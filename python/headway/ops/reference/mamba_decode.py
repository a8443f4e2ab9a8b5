"""The decode step over slot windows, one token after the other: from the log, then from the step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from headway.ops.reference.common import silu, wide
from headway.ops.reference.mamba import step_sizes
from headway.ops.reference.norm import gated_rms_norm_ref
from headway.ops.state_log import MixerWeights, StateLog


def mamba_decode_ref(
    z: Tensor,
    columns: Tensor,
    dt: Tensor,
    weights: MixerWeights,
    conv_state: Tensor,
    ssm_state: Tensor,
    log: StateLog,
    query_start: Tensor,
    row_start: Tensor,
    slots: Tensor,
    state_base: Tensor,
    *,
    max_query_len: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """See `ops.mamba_decode`."""
    y = torch.zeros(z.shape, dtype=wide(z).dtype)
    bounds = query_start.tolist()
    rows = zip(slots.tolist(), state_base.tolist(), row_start.tolist(), strict=True)
    for (slot, base, start), begin, end in zip(rows, bounds, bounds[1:], strict=False):
        if slot == 0 or begin == end:
            continue
        row = _Row(weights, conv_state, ssm_state, log, slot, base, start)
        next_base = log.window.next_base(base, start, start + end - begin)
        for position in range(base, start):
            row.replay(position, next_base)
        for token in range(begin, end):
            y[token] = row.compute(start + token - begin, columns[token], dt[token], next_base)
    y = y.to(z.dtype)
    return gated_rms_norm_ref(y, z, weights.norm_weight, weights.norm_eps, weights.norm_group_size, out=out)


def fold_states_ref(
    weights: MixerWeights,
    conv_state: Tensor,
    ssm_state: Tensor,
    log: StateLog,
    state_base: Tensor,
    copies: Iterable[tuple[int, int, int]],
) -> None:
    """See `ops.fold_states`; copies are (from slot, to slot, position)."""
    for source, target, position in copies:
        base = int(state_base[source])
        row = _Row(weights, conv_state, ssm_state, log, source, base, position)
        for logged in range(base, position):
            row.replay(logged, position)
        ssm_state[target], conv_state[target] = row.state, row.conv_slot.clone()


class _Row:
    """One row's state on its way from the base to the step's end."""

    def __init__(
        self,
        weights: MixerWeights,
        conv_state: Tensor,
        ssm_state: Tensor,
        log: StateLog,
        slot: int,
        base: int,
        start: int,
    ) -> None:
        self.weights, self.log = weights, log
        self.conv_slot, self.ssm_slot = conv_state[slot], ssm_state[slot]
        self.columns, self.dt, self.raw = log.columns[slot], log.dt[slot], log.raw[slot]
        self.state = self.ssm_slot.clone() if base > 0 else torch.zeros_like(self.ssm_slot)
        if start == base:
            for age in range(
                min(start, len(self.conv_slot))
            ):  # the ring takes over from the columns at the base
                self.raw[(start - 1 - age) % len(self.raw)] = self.conv_slot[-1 - age]

    def replay(self, position: int, next_base: int) -> None:
        entry = position % len(self.columns)
        self._advance(self.columns[entry], self.dt[entry], position, next_base)

    def compute(self, position: int, column: Tensor, dt: Tensor, next_base: int) -> Tensor:
        """A new token's y [H * P]."""
        self.raw[position % len(self.raw)] = column
        past = self._past(position + 1, len(self.weights.conv_weight))
        total = (wide(past) * wide(self.weights.conv_weight)).sum(0)
        bias = self.weights.conv_bias
        convolved = silu(total if bias is None else total + wide(bias)).to(column.dtype)
        entry = position % len(self.columns)
        self.columns[entry], self.dt[entry] = convolved[: self.columns.shape[1]], dt
        self._advance(self.columns[entry], dt, position, next_base)
        return self._read_out(convolved)

    def _past(self, end: int, count: int) -> Tensor:
        """The raw columns before `end`, zeros before the sequence."""
        positions = range(end - count, end)
        return torch.stack(
            [self.raw[p % len(self.raw)] if p >= 0 else torch.zeros_like(self.raw[0]) for p in positions]
        )

    def _advance(self, inputs: Tensor, dt: Tensor, position: int, next_base: int) -> None:
        """S = exp(A dt) S + dt x B^T; kept where the slot's state moves to."""
        weights = self.weights
        num_heads, head_dim, _ = self.state.shape
        x, B = torch.split(wide(inputs), [num_heads * head_dim, len(inputs) - num_heads * head_dim])
        step = step_sizes(wide(dt) + wide(weights.dt_bias), weights.dt_min, weights.dt_max)
        inflow = (step[:, None] * x.view(num_heads, head_dim))[:, :, None] * self._by_head(B)[:, None, :]
        self.state = self.state * torch.exp(step * wide(weights.A))[:, None, None] + inflow
        if position + 1 == next_base:
            self.ssm_slot.copy_(self.state)
            self.conv_slot.copy_(self._past(next_base, len(self.conv_slot)))

    def _read_out(self, convolved: Tensor) -> Tensor:
        num_heads, head_dim, _ = self.state.shape
        x = wide(convolved[: num_heads * head_dim]).view(num_heads, head_dim)
        C = wide(convolved[self.columns.shape[1] :])
        y = (self.state * self._by_head(C)[:, None, :]).sum(-1) + wide(self.weights.D)[:, None] * x
        return y.flatten()

    def _by_head(self, states: Tensor) -> Tensor:
        """[G * N] -> [H, N]."""
        num_heads, _, state_size = self.state.shape
        by_group = states.view(-1, state_size)
        return by_group.repeat_interleave(num_heads // len(by_group), dim=0)
