"""The decode step of a Mamba-2 mixer over slot windows: convolution, recurrence, gate and grouped norm.

Three chained launches on a GPU (`csrc/cuda/mamba_decode.cu`). On a CPU the log is replayed by the other ops
(`ops.state_replay`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headway.errors import ArgumentError
from headway.ops.backend import target_of
from headway.ops.checks import (
    check_index,
    check_inner_dense,
    check_same_dtype,
    check_shape,
    check_vector,
    dtype_code,
    output_like,
    state_dtype_code,
)
from headway.ops.norm import gated_rms_norm
from headway.ops.state_log import WINDOW_TOKENS, MixerWeights, StateLog
from headway.ops.state_replay import SlotRows, replay_rows

MAX_QUERY_LEN = 8  # kMaxQuery of csrc/cuda/mamba_decode.h
VECTOR_BYTES = 16
# What the GPU kernels are compiled for.
TAPS = 4
STATE_SIZES = (64, 128, 256)
CHANNELS = 16  # a head has a multiple of
WEIGHTS_PER_HEAD = WINDOW_TOKENS + 4  # kTableWidth of csrc/cuda/mamba_decode.h


def is_supported(
    *, num_heads: int, head_dim: int, num_groups: int, state_size: int, width: int, dtype: torch.dtype
) -> bool:
    """Whether the GPU kernel takes a mixer of these sizes, its inputs being slices of an in_proj output."""
    in_proj_columns = 2 * num_heads * head_dim + 2 * num_groups * state_size + num_heads
    is_aligned = in_proj_columns % (VECTOR_BYTES // dtype.itemsize) == 0
    return is_aligned and _has_kernel(width, state_size, head_dim)


def _has_kernel(width: int, state_size: int, head_dim: int) -> bool:
    return width == TAPS and state_size in STATE_SIZES and head_dim % CHANNELS == 0


@dataclass(frozen=True)
class _Scratch:
    """What the GPU's launches hand to each other; contiguous."""

    convolved: Tensor  # [T, conv_dim]
    weights: Tensor  # [T, H, WEIGHTS_PER_HEAD] float32: of each input in a token's output, of the state
    scanned: Tensor  # [T, H * P]

    @staticmethod
    def allocate(z: Tensor, conv_dim: int, num_heads: int) -> _Scratch:
        num_tokens = z.shape[0]
        return _Scratch(
            z.new_empty(num_tokens, conv_dim),
            z.new_empty(num_tokens, num_heads, WEIGHTS_PER_HEAD, dtype=torch.float32),
            z.new_empty(z.shape),
        )


def mamba_decode(
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
    """gated_rms_norm(ssm_scan(causal_conv1d(columns)), z) for rows of a few tokens, whose slots have a log.

    Row r owns tokens query_start[r] .. query_start[r + 1], 1 to max_query_len of them. Its slot holds the state after
    state_base[r] tokens and the log since; where the step leaves it is `StateWindow.next_base`. Rows of slot 0 are
    padding: their outputs mean nothing and no slot changes.

    Args:
        z: [T, H * P], like columns and dt a slice of the in_proj output.
        columns: [T, conv_dim]: x, B and C before the convolution.
        dt: [T, H] raw.
        weights: of the mixer.
        conv_state: [num_slots, W - 1, conv_dim] raw columns before the base, oldest first; updated.
        ssm_state: [num_slots, H, P, N] float32, or float16 as `ssm_scan` rounds it, at the base; updated.
        log: updated.
        query_start: [R + 1] prefix sums of the rows' tokens.
        row_start: [R] position of each row's first token.
        slots: [R].
        state_base: [R].
        max_query_len: at most 8 on a GPU, and at most log.window.max_rewind + 1.
        out: [T, H * P] contiguous.

    Returns:
        [T, H * P] in z's dtype.
    """
    op = "mamba_decode"
    _check(op, z, columns, dt, weights, conv_state, ssm_state)
    num_tokens, num_rows = z.shape[0], row_start.shape[0]
    check_index(op, "query_start", query_start, num_rows + 1, "R + 1")
    for name, tensor in (("row_start", row_start), ("slots", slots), ("state_base", state_base)):
        check_index(op, name, tensor, num_rows, "R")
    if not 1 <= max_query_len <= log.window.max_rewind + 1:
        raise ArgumentError(
            f"{op}: max_query_len must be in 1..{log.window.max_rewind + 1}, got {max_query_len}"
        )
    if z.is_cpu:
        rows = SlotRows.read(query_start, row_start, slots, state_base, log)
        y = replay_rows(columns, dt, weights, conv_state, ssm_state, log, rows)
        return gated_rms_norm(y, z, weights.norm_weight, weights.norm_eps, weights.norm_group_size, out=out)
    _, num_heads, head_dim, state_size = ssm_state.shape
    width, conv_dim = weights.conv_weight.shape
    check_gpu_window(op, ssm_state, log, width)
    _check_gpu_tokens(op, z, max_query_len)
    num_groups = (conv_dim - num_heads * head_dim) // (2 * state_size)
    scratch = _Scratch.allocate(z, conv_dim, num_heads)
    result = output_like(op, out, (num_tokens, num_heads * head_dim), z)
    kernels, stream = target_of(z)
    # fmt: off
    kernels.mamba_decode(
        num_rows, query_start.data_ptr(), row_start.data_ptr(), num_tokens, max_query_len,
        num_heads, head_dim, num_groups, state_size, width,
        z.data_ptr(), columns.data_ptr(), dt.data_ptr(), z.stride(0),
        weights.conv_weight.data_ptr(), 0 if weights.conv_bias is None else weights.conv_bias.data_ptr(),
        weights.A.data_ptr(), weights.D.data_ptr(), weights.dt_bias.data_ptr(), weights.dt_min, weights.dt_max,
        weights.norm_weight.data_ptr(), weights.norm_eps, weights.norm_group_size,
        conv_state.data_ptr(), conv_state.stride(0), ssm_state.data_ptr(), ssm_state.stride(0),
        state_dtype_code(op, "ssm_state", ssm_state), slots.data_ptr(), state_base.data_ptr(),
        log.columns.data_ptr(), log.columns.stride(0), log.dt.data_ptr(), log.dt.stride(0),
        log.raw.data_ptr(), log.raw.stride(0), log.columns.shape[1], log.raw.shape[1],
        log.window.num_tokens, log.window.max_rewind,
        scratch.convolved.data_ptr(), scratch.weights.data_ptr(), scratch.scanned.data_ptr(), result.data_ptr(),
        dtype_code(op, "z", z), stream,
    )
    # fmt: on
    return result


def check_gpu_window(op: str, ssm_state: Tensor, log: StateLog, width: int) -> None:
    """Of states and log on a GPU."""
    head_dim, state_size = ssm_state.shape[2:]
    if not _has_kernel(width, state_size, head_dim):
        raise ArgumentError(
            f"{op}: on a GPU W must be {TAPS}, N one of {STATE_SIZES} and P a multiple of {CHANNELS}, got "
            f"W = {width}, N = {state_size}, P = {head_dim}"
        )
    if log.window.num_tokens != WINDOW_TOKENS:
        raise ArgumentError(
            f"{op}: log.window must have {WINDOW_TOKENS} tokens on a GPU, got {log.window.num_tokens}"
        )


def _check_gpu_tokens(op: str, z: Tensor, max_query_len: int) -> None:
    if max_query_len > MAX_QUERY_LEN:
        raise ArgumentError(
            f"{op}: max_query_len must be at most {MAX_QUERY_LEN} on a GPU, got {max_query_len}"
        )
    if z.stride(0) * z.itemsize % VECTOR_BYTES:
        raise ArgumentError(
            f"{op}: z's token stride must be a multiple of {VECTOR_BYTES} bytes, got {z.stride(0)}"
        )


def _check(
    op: str,
    z: Tensor,
    columns: Tensor,
    dt: Tensor,
    weights: MixerWeights,
    conv_state: Tensor,
    ssm_state: Tensor,
) -> None:
    num_tokens, num_slots = z.shape[0], conv_state.shape[0]
    _, num_heads, head_dim, state_size = ssm_state.shape
    width, conv_dim = weights.conv_weight.shape
    d_inner = num_heads * head_dim
    if conv_dim <= d_inner or (conv_dim - d_inner) % (2 * state_size):
        raise ArgumentError(
            f"{op}: conv_weight must have H * P + 2 G N columns, H * P = {d_inner}, N = {state_size}; got {conv_dim}"
        )
    check_shape(op, "z", z, (num_tokens, d_inner), "T, H * P")
    check_shape(op, "columns", columns, (num_tokens, conv_dim), "T, conv_dim")
    check_shape(op, "dt", dt, (num_tokens, num_heads), "T, H")
    check_shape(op, "conv_state", conv_state, (num_slots, width - 1, conv_dim), "num_slots, W - 1, conv_dim")
    check_vector(op, "norm_weight", weights.norm_weight, d_inner, "H * P")
    for name, vector in (("A", weights.A), ("D", weights.D), ("dt_bias", weights.dt_bias)):
        check_vector(op, name, vector, num_heads, "H")
        check_same_dtype(op, name, vector, torch.float32)
    if weights.norm_group_size < 1 or d_inner % weights.norm_group_size:
        raise ArgumentError(
            f"{op}: norm_group_size must divide H * P = {d_inner}, got {weights.norm_group_size}"
        )
    for name, tensor in (("z", z), ("columns", columns), ("dt", dt), ("conv_state", conv_state)):
        check_inner_dense(op, name, tensor)
        check_same_dtype(op, name, tensor, z.dtype)
    state_dtype_code(op, "ssm_state", ssm_state)
    if not z.stride(0) == columns.stride(0) == dt.stride(0):
        strides = (z.stride(0), columns.stride(0), dt.stride(0))
        raise ArgumentError(
            f"{op}: z, columns and dt must be slices of one tensor, got token strides {strides}"
        )
