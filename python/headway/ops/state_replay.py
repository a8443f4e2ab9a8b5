"""Slot windows on a CPU: the log is replayed token by token by the other ops, so that no bit differs from states that
are kept in place."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from headway.ops.mamba import causal_conv1d, ssm_scan
from headway.ops.state_log import MixerWeights, StateLog


@dataclass(frozen=True)
class SlotRows:
    """The step's rows on the host."""

    begins: list[int]  # of each row's tokens
    counts: list[int]
    starts: list[int]
    slots: list[int]
    bases: list[int]
    next_bases: list[int]

    @staticmethod
    def read(
        query_start: Tensor, row_start: Tensor, slots: Tensor, state_base: Tensor, log: StateLog
    ) -> SlotRows:
        bounds, starts, bases = query_start.tolist(), row_start.tolist(), state_base.tolist()
        counts = [end - begin for begin, end in pairwise(bounds)]
        ends = [
            log.window.next_base(base, start, start + count)
            for base, start, count in zip(bases, starts, counts, strict=True)
        ]
        return SlotRows(bounds[:-1], counts, starts, slots.tolist(), bases, ends)


def replay_rows(
    columns: Tensor,
    dt: Tensor,
    weights: MixerWeights,
    conv_state: Tensor,
    ssm_state: Tensor,
    log: StateLog,
    rows: SlotRows,
) -> Tensor:
    """y [T, H * P], row by row: the log and the new tokens run from the base on, cut where the state is kept."""
    y = columns.new_zeros(columns.shape[0], ssm_state.shape[1] * ssm_state.shape[2])
    for index, count in enumerate(rows.counts):
        slot, base, start = rows.slots[index], rows.bases[index], rows.starts[index]
        if count == 0 or slot == 0:
            continue
        tokens = slice(rows.begins[index], rows.begins[index] + count)
        past = past_columns(conv_state, log, slot, base, start)
        convolved = _convolve(columns[tokens], past, weights, start)
        _append(log, slot, start, convolved, dt[tokens], torch.cat([past, columns[tokens]]))
        num_old, num_folded = start - base, rows.next_bases[index] - base
        inputs = torch.cat([_logged(log.columns[slot], base, start), convolved[:, : log.columns.shape[2]]])
        steps = torch.cat([_logged(log.dt[slot], base, start), dt[tokens]])
        queries = convolved[:, inputs.shape[1] :]
        queries = torch.cat([queries.new_zeros(num_old, queries.shape[1]), queries])
        state = ssm_state[slot : slot + 1] if base > 0 else torch.zeros_like(ssm_state[slot : slot + 1])
        folded = state.clone()
        first = _scan(inputs[:num_folded], queries[:num_folded], steps[:num_folded], weights, folded, base)
        if num_folded > 0:
            ssm_state[slot] = folded[0]
            conv_state[slot] = past_columns(conv_state, log, slot, base, base + num_folded)
        rest = _scan(
            inputs[num_folded:], queries[num_folded:], steps[num_folded:], weights, folded, base + num_folded
        )
        y[tokens] = torch.cat([first, rest])[num_old:]
    return y


def past_columns(conv_state: Tensor, log: StateLog, slot: int, base: int, start: int) -> Tensor:
    """The W - 1 raw columns before start, zeros before the sequence."""
    if start == base:
        return conv_state[slot].clone() if start > 0 else torch.zeros_like(conv_state[slot])
    positions = range(start - conv_state.shape[1], start)
    column = log.raw[slot]
    return torch.stack(
        [column[p % len(column)] if p >= 0 else torch.zeros_like(column[0]) for p in positions]
    )


def _convolve(columns: Tensor, past: Tensor, weights: MixerWeights, start: int) -> Tensor:
    row = _one_row(columns.shape[0], start)
    return causal_conv1d(columns, weights.conv_weight, weights.conv_bias, past[None].clone(), *row)


def _scan(
    inputs: Tensor, queries: Tensor, dt: Tensor, weights: MixerWeights, state: Tensor, start: int
) -> Tensor:
    """inputs [tokens, H * P + G * N] (x and B), queries [tokens, G * N] (C) -> [tokens, H * P]; updates state."""
    _, num_heads, head_dim, state_size = state.shape
    x, B = torch.split(inputs, [num_heads * head_dim, queries.shape[1]], dim=1)
    groups = (queries.shape[1] // state_size, state_size)
    y = ssm_scan(
        x.view(len(x), num_heads, head_dim), B.view(len(x), *groups), queries.view(len(x), *groups), dt,
        weights.A, weights.D, weights.dt_bias, state, *_one_row(len(inputs), start), weights.dt_min, weights.dt_max,
    )  # fmt: skip
    return y.flatten(1)


def _one_row(num_tokens: int, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query_start, row_start, read_slots and write_slots of a row alone."""
    slot = torch.zeros(1, dtype=torch.int32)
    return (
        torch.tensor([0, num_tokens], dtype=torch.int32),
        torch.tensor([start], dtype=torch.int32),
        slot,
        slot,
    )


def _append(log: StateLog, slot: int, start: int, convolved: Tensor, dt: Tensor, raw: Tensor) -> None:
    """Keeps the new tokens' inputs; raw begins with the columns before start."""
    positions = torch.arange(start, start + len(dt))
    log.columns[slot, positions % log.columns.shape[1]] = convolved[:, : log.columns.shape[2]]
    log.dt[slot, positions % log.dt.shape[1]] = dt
    raw_positions = torch.arange(start + len(dt) - len(raw), start + len(dt))
    log.raw[slot, raw_positions % log.raw.shape[1]] = raw


def _logged(ring: Tensor, begin: int, end: int) -> Tensor:
    return ring[torch.arange(begin, end) % len(ring)]


def replay_to(
    weights: MixerWeights,
    conv_state: Tensor,
    ssm_state: Tensor,
    log: StateLog,
    *,
    source: int,
    target: int,
    base: int,
    position: int,
) -> None:
    """Slot `target` gets the state that slot `source`, whose state is at base, has after `position` tokens."""
    inputs, dt = _logged(log.columns[source], base, position), _logged(log.dt[source], base, position)
    state = ssm_state[source : source + 1].clone()
    if base == 0:
        state.zero_()
    queries = inputs.new_zeros(len(inputs), log.raw.shape[2] - inputs.shape[1])
    _scan(inputs, queries, dt, weights, state, base)
    columns = past_columns(conv_state, log, source, base, position)
    ssm_state[target], conv_state[target] = state[0], columns
