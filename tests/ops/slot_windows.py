"""Rows that decode over slot windows, step by step, and the same tokens over states in place."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway import ops
from headway.ops import reference
from headway.ops.state_log import MixerWeights, StateLog, StateWindow
from tests.cases import NAN, MambaCase
from tests.inputs import normal

WINDOW = 16


def mixer_weights(case: MambaCase, dtype: torch.dtype, device: str) -> MixerWeights:
    heads = torch.rand(3, case.num_heads, generator=torch.Generator().manual_seed(5))
    bias = normal(case.conv_dim, dtype=dtype, seed=3).to(device) if case.has_bias else None
    return MixerWeights(
        conv_weight=normal(case.width, case.conv_dim, dtype=dtype, seed=2, scale=0.5).to(device),
        conv_bias=bias,
        A=(-heads[0] * 4).to(device),
        D=heads[1].to(device),
        dt_bias=(heads[2] - 1).to(device),
        norm_weight=normal(case.d_inner, dtype=dtype, seed=4).to(device),
        norm_eps=1e-5,
        norm_group_size=case.d_inner // case.num_groups,
    )


def _in_float64(record: Any) -> Any:
    """The record with its floating-point tensors in float64 on the CPU, sharing nothing."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    wide = {
        name: value.detach().cpu().double() for name, value in values.items() if isinstance(value, Tensor)
    }
    return type(record)(**{**values, **wide})


@dataclass(frozen=True)
class Inputs:
    """in_proj outputs of `length` positions of each row, as one tensor would hold them."""

    z: Tensor  # [rows, length, H * P]
    columns: Tensor  # [rows, length, conv_dim]
    dt: Tensor  # [rows, length, H]

    @staticmethod
    def draw(
        case: MambaCase, num_rows: int, length: int, dtype: torch.dtype, device: str, seed: int = 1
    ) -> Inputs:
        width = case.d_inner + case.conv_dim + case.num_heads
        # Row by row, so that a row's values do not depend on how many rows there are.
        rows = [normal(length, width, dtype=dtype, seed=100 * seed + row) for row in range(num_rows)]
        return Inputs(
            *torch.stack(rows).to(device).split([case.d_inner, case.conv_dim, case.num_heads], dim=2)
        )

    def in_float64(self) -> Inputs:
        return _in_float64(self)

    def of(self, rows: list[int], starts: list[int], counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """z, columns, dt [T, ...] of a step, slices of one buffer with a gap of NaN between tokens."""
        wide = torch.cat([self.z, self.columns, self.dt], dim=2)
        tokens = [wide[r, s : s + n] for r, s, n in zip(rows, starts, counts, strict=True)]
        flat = torch.cat(tokens)
        width = flat.shape[1]
        buffer = torch.full((len(flat), width + 8 + -width % 8), NAN, dtype=flat.dtype, device=flat.device)
        buffer[:, :width] = flat
        return tuple(
            buffer[:, :width].split([self.z.shape[2], self.columns.shape[2], self.dt.shape[2]], dim=1)
        )


class WindowedRows:
    """Rows over slots with a log; row i has slot i + 1 and starts at origins[i] with a random state."""

    def __init__(
        self,
        case: MambaCase,
        origins: list[int],
        dtype: torch.dtype,
        device: str,
        *,
        max_rewind: int = 7,
        max_query_len: int = 8,
        ssm_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.op = ops.mamba_decode
        self.case, self.weights = case, mixer_weights(case, dtype, device)
        num_slots = len(origins) + 2
        conv = torch.full((num_slots, case.width - 1, case.conv_dim), NAN, dtype=dtype)
        ssm = torch.full((num_slots, case.num_heads, case.head_dim, case.state_size), NAN)
        for row in range(len(origins)):
            conv[row + 1] = normal(*conv.shape[1:], dtype=dtype, seed=10 + row)
            conv[row + 1, : max(0, case.width - 1 - origins[row])] = 0  # before the sequence
            ssm[row + 1] = normal(*ssm.shape[1:], seed=300 + row)
        self.conv_state, self.ssm_state = conv.to(device), ssm.to(device, ssm_dtype)
        self.log = StateLog.allocate(
            num_slots,
            d_inner=case.d_inner,
            group_states=case.num_groups * case.state_size,
            num_heads=case.num_heads,
            width=case.width,
            window=StateWindow(WINDOW, max_rewind),
            max_query_len=max_query_len,
            dtype=dtype,
            device=device,
        )
        for ring in (self.log.columns, self.log.dt, self.log.raw):
            ring.fill_(NAN)
        self.positions, self.bases = list(origins), list(origins)
        self.spread_tokens: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def step(self, inputs: Inputs, counts: list[int], rows: list[int] | None = None) -> Tensor:
        """counts[i] new tokens of rows[i] (default: all) -> [T, H * P]; input position 0 is each row's origin."""
        rows = list(range(len(counts))) if rows is None else rows
        device = self.ssm_state.device

        def index(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        starts = [self.positions[row] for row in rows]
        out = self.op(
            *map(self.spread_tokens, inputs.of(rows, starts, counts)),
            self.weights,
            self.conv_state,
            self.ssm_state,
            self.log,
            index([0, *torch.tensor(counts).cumsum(0).tolist()]),
            index(starts),
            index([row + 1 for row in rows]),
            index([self.bases[row] for row in rows]),
            max_query_len=max(counts),
        )
        for row, start, count in zip(rows, starts, counts, strict=True):
            end = start + count
            self.bases[row] = self.log.window.next_base(self.bases[row], start, end)
            self.positions[row] = end
        return out

    def oracle(self) -> WindowedRows:
        """The same rows, by the reference in float64."""
        rows = copy.copy(self)
        rows.op = reference.mamba_decode_ref
        rows.weights, rows.log = _in_float64(self.weights), _in_float64(self.log)
        rows.conv_state, rows.ssm_state = self.conv_state.cpu().double(), self.ssm_state.cpu().double()
        rows.positions, rows.bases = list(self.positions), list(self.bases)
        return rows

    def rewind(self, num_tokens: int) -> None:
        self.positions = [position - num_tokens for position in self.positions]


def walk(rows: WindowedRows, inputs: Inputs, end: int, query_len: int = 1) -> Tensor:
    """Every row from where it is to position end, query_len tokens a step -> [rows, end - first, H * P]."""
    num_rows, parts = len(rows.positions), []
    while (done := rows.positions[0]) < end:
        count = min(query_len, end - done)
        parts.append(rows.step(inputs, [count] * num_rows).unflatten(0, (num_rows, count)))
    return torch.cat(parts, dim=1)


def in_place(rows: WindowedRows, inputs: Inputs, end: int) -> Tensor:
    """The same walk by the three ops over states in place, before rows has moved -> [rows, end - first, H * P]."""
    case, weights = rows.case, rows.weights
    conv_state, ssm_state = rows.conv_state.clone(), rows.ssm_state.clone()
    num_rows, device = len(rows.positions), ssm_state.device
    query_start = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
    slots = query_start[:num_rows] + 1
    states = case.num_groups * case.state_size
    parts = []
    for position in range(rows.positions[0], end):
        z, columns, dt = inputs.of(list(range(num_rows)), [position] * num_rows, [1] * num_rows)
        step = (query_start, torch.full_like(slots, position), slots, slots)
        convolved = ops.causal_conv1d(columns, weights.conv_weight, weights.conv_bias, conv_state, *step)
        x, B, C = convolved.split([case.d_inner, states, states], dim=1)
        groups = (case.num_groups, case.state_size)
        y = ops.ssm_scan(
            x.unflatten(1, (case.num_heads, case.head_dim)), B.unflatten(1, groups), C.unflatten(1, groups), dt,
            weights.A, weights.D, weights.dt_bias, ssm_state, *step, max_query_len=1,
        )  # fmt: skip
        parts.append(
            ops.gated_rms_norm(
                y.flatten(1), z, weights.norm_weight, weights.norm_eps, weights.norm_group_size
            )
        )
    return torch.stack(parts, dim=1)
