"""The two recurrent ops of a Mamba-2 mixer over ragged rows and state slots.

Row r owns tokens query_start[r] .. query_start[r + 1] and continues from read_slots[r] unless row_start[r] is 0, in
which case it starts from zeros and the slot is not read. Its final state goes to write_slots[r], also when it has no
tokens. A slot written by one row must not be read or written by another row of the same call, except slot 0, the
dummy. `Snapshots` name more slots, which take the state a row has after some of its tokens: bit for bit what its own
slot would hold had the row been cut there. All index tensors are int32.
"""

from __future__ import annotations

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
from headway.ops.records import Snapshots

CUDA_CHUNK_TOKENS = 64  # kChunkTokens of csrc/cuda/ssm_scan.h
MAX_STATE_SIZE = {"cpu": 512, "cuda": 256}  # by type of device


def scan_grid_tokens(device_type: str, dtype: torch.dtype) -> int:
    """Cuts of a prompt at absolute multiples of this change no bit of `ssm_scan`; 1: cuts anywhere do not."""
    return CUDA_CHUNK_TOKENS if device_type == "cuda" and dtype != torch.float32 else 1


def causal_conv1d(
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
    """Depthwise causal convolution over time, then silu.

    Args:
        x: [T, conv_dim], tokens may be strided.
        weight: [W, conv_dim] tap-major, W in 2..4; the last tap meets the newest token.
        bias: [conv_dim] or None.
        state: [num_slots, W - 1, conv_dim] raw columns, oldest first; updated.
        query_start: [R + 1] prefix sums of the rows' tokens.
        row_start: [R] absolute position of each row's first token.
        read_slots: [R].
        write_slots: [R].
        snapshots: states to keep on the way.
        out: [T, conv_dim] contiguous, not x.

    Returns:
        [T, conv_dim] in x's dtype.
    """
    op = "causal_conv1d"
    num_tokens, num_channels = x.shape
    num_rows = row_start.shape[0]
    width = weight.shape[0]
    if not 2 <= width <= 4:
        raise ArgumentError(f"{op}: weight must have 2 to 4 taps, got {width}")
    check_inner_dense(op, "x", x)
    check_shape(op, "weight", weight, (width, num_channels), "W, conv_dim")
    check_inner_dense(op, "weight", weight)
    check_same_dtype(op, "weight", weight, x.dtype)
    if bias is not None:
        check_vector(op, "bias", bias, num_channels, "conv_dim")
        check_same_dtype(op, "bias", bias, x.dtype)
    check_shape(op, "state", state, (state.shape[0], width - 1, num_channels), "num_slots, W - 1, conv_dim")
    check_inner_dense(op, "state", state)
    check_same_dtype(op, "state", state, x.dtype)
    _check_rows(op, num_rows, query_start, row_start, read_slots, write_slots)
    result = output_like(op, out, (num_tokens, num_channels), x)
    kernels, stream = target_of(x)
    kernels.causal_conv1d(
        num_rows,
        query_start.data_ptr(),
        row_start.data_ptr(),
        num_tokens,
        num_channels,
        width,
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        state.data_ptr(),
        state.stride(0),
        read_slots.data_ptr(),
        write_slots.data_ptr(),
        result.data_ptr(),
        dtype_code(op, "x", x),
        *_addresses(op, snapshots, num_rows),
        stream,
    )
    return result


def ssm_scan(
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
    """The Mamba-2 recurrence: S = exp(A dt) S + dt x B^T, y = S C + D x.

    Args:
        x: [T, H, P], tokens may be strided, likewise B, C and dt.
        B: [T, G, N]; head h uses group h // (H // G).
        C: [T, G, N].
        dt: [T, H] raw; dt_bias, softplus and the clamp to dt_min .. dt_max happen here.
        A: [H] float32, negative.
        D: [H] float32.
        dt_bias: [H] float32.
        state: [num_slots, H, P, N] float32, or float16: rounded at random, without bias, by position and place
            (csrc/core/state_rounding.h); updated.
        query_start: [R + 1] prefix sums of the rows' tokens.
        row_start: [R] absolute position of each row's first token.
        read_slots: [R].
        write_slots: [R].
        dt_min: lower clamp of the step size.
        dt_max: upper clamp of the step size.
        max_query_len: at least the longest row's tokens, where the host knows it; chooses between kernels.
        snapshots: states to keep on the way; on a GPU those of bfloat16 prompts stand at absolute multiples of
            `scan_grid_tokens` or at the row's end.
        out: [T, H, P] contiguous.

    Returns:
        [T, H, P] in x's dtype.
    """
    op = "ssm_scan"
    num_tokens, num_heads, head_dim = x.shape
    num_groups, state_size = B.shape[1:]
    num_rows = row_start.shape[0]
    _check_scan(op, x, B, C, dt)
    for name, tensor in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        check_vector(op, name, tensor, num_heads, "H")
        check_same_dtype(op, name, tensor, torch.float32)
    check_shape(op, "state", state, (state.shape[0], num_heads, head_dim, state_size), "num_slots, H, P, N")
    check_inner_dense(op, "state", state)
    state_dtype = state_dtype_code(op, "state", state)
    _check_rows(op, num_rows, query_start, row_start, read_slots, write_slots)
    result = output_like(op, out, (num_tokens, num_heads, head_dim), x)
    kernels, stream = target_of(x)
    # fmt: off
    kernels.ssm_scan(
        num_rows, query_start.data_ptr(), row_start.data_ptr(),
        num_tokens, num_heads, head_dim, num_groups, state_size,
        x.data_ptr(), x.stride(0), B.data_ptr(), B.stride(0), C.data_ptr(), C.stride(0), dt.data_ptr(), dt.stride(0),
        A.data_ptr(), D.data_ptr(), dt_bias.data_ptr(), dt_min, dt_max,
        state.data_ptr(), state.stride(0), state_dtype, read_slots.data_ptr(), write_slots.data_ptr(),
        result.data_ptr(), dtype_code(op, "x", x), max_query_len,
        *_addresses(op, snapshots, num_rows), stream,
    )
    # fmt: on
    return result


def _addresses(op: str, snapshots: Snapshots | None, num_rows: int) -> tuple[int, int, int]:
    if snapshots is None:
        return (0, 0, 0)
    check_index(op, "snapshots.starts", snapshots.starts, num_rows + 1, "R + 1")
    check_index(op, "snapshots.positions", snapshots.positions, len(snapshots.positions), "n")
    check_index(op, "snapshots.slots", snapshots.slots, len(snapshots.positions), "n")
    return (snapshots.starts.data_ptr(), snapshots.positions.data_ptr(), snapshots.slots.data_ptr())


def _check_scan(op: str, x: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> None:
    num_tokens, num_heads, _ = x.shape
    num_groups, state_size = B.shape[1:]
    if num_groups < 1 or num_heads % num_groups:
        raise ArgumentError(
            f"{op}: B must have a number of groups that divides H = {num_heads}, got {num_groups}"
        )
    max_state_size = MAX_STATE_SIZE["cpu" if x.is_cpu else "cuda"]
    if state_size > max_state_size:
        raise ArgumentError(
            f"{op}: B must have at most N = {max_state_size} states a group here, got {state_size}"
        )
    check_shape(op, "B", B, (num_tokens, num_groups, state_size), "T, G, N")
    check_shape(op, "C", C, (num_tokens, num_groups, state_size), "T, G, N")
    check_shape(op, "dt", dt, (num_tokens, num_heads), "T, H")
    for name, tensor in (("x", x), ("B", B), ("C", C), ("dt", dt)):
        check_inner_dense(op, name, tensor)
        check_same_dtype(op, name, tensor, x.dtype)


def _check_rows(
    op: str, num_rows: int, query_start: Tensor, row_start: Tensor, read_slots: Tensor, write_slots: Tensor
) -> None:
    check_index(op, "query_start", query_start, num_rows + 1, "R + 1")
    check_index(op, "row_start", row_start, num_rows, "R")
    check_index(op, "read_slots", read_slots, num_rows, "R")
    check_index(op, "write_slots", write_slots, num_rows, "R")
