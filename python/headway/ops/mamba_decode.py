"""A Mamba-2 mixer's decode step between its projections: convolution, recurrence, gate and norm of one token a row.

One launch on a GPU whose tensors suit it (`csrc/cuda/mamba_decode.cu`), the three ops one after the other elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.ops.backend import target_of
from headway.ops.checks import (
    check_index,
    check_inner_dense,
    check_same_dtype,
    check_shape,
    check_vector,
    dtype_code,
    output_like,
)
from headway.ops.mamba import causal_conv1d, ssm_scan
from headway.ops.norm import gated_rms_norm

FUSED_WIDTH = 4
FUSED_STATE_SIZES = (64, 128, 256)
FUSED_HEAD_DIM_MULTIPLE = 16
VECTOR_BYTES = 16


def mamba_decode(
    z: Tensor,
    columns: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    row_start: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    dt_min: float = 0.0,
    dt_max: float = float("inf"),
    *,
    out: Tensor | None = None,
) -> Tensor:
    """gated_rms_norm(ssm_scan(causal_conv1d(columns)), z) for rows of exactly one token; token r is row r's.

    Args:
        z: [R, H * P], like columns and dt a slice of the in_proj output.
        columns: [R, conv_dim]: x, B and C before the convolution.
        dt: [R, H] raw.
        conv_weight: [W, conv_dim] tap-major.
        conv_bias: [conv_dim] or None.
        conv_state: [num_slots, W - 1, conv_dim] raw columns, oldest first; updated.
        A: [H] float32, negative.
        D: [H] float32.
        dt_bias: [H] float32.
        ssm_state: [num_slots, H, P, N] float32; updated.
        norm_weight: [H * P].
        norm_eps: added to the mean square; the norm's groups are those of B and C.
        row_start: [R] position of each row's token; 0 = the row starts from zeros and its slot is not read.
        read_slots: [R].
        write_slots: [R].
        dt_min: lower clamp of the step size.
        dt_max: upper clamp of the step size.
        out: [R, H * P] contiguous.

    Returns:
        [R, H * P] in z's dtype.
    """
    op = "mamba_decode"
    num_rows, d_inner = z.shape
    _, num_heads, head_dim, state_size = ssm_state.shape
    width, conv_dim = conv_weight.shape
    num_groups = (conv_dim - d_inner) // (2 * state_size)
    _check(op, z, columns, dt, conv_weight, conv_state, ssm_state, norm_weight)
    for name, tensor in (("row_start", row_start), ("read_slots", read_slots), ("write_slots", write_slots)):
        check_index(op, name, tensor, num_rows, "R")
    if not _is_fused(z, columns, dt, conv_weight, conv_bias, conv_state, ssm_state, norm_weight):
        rows = (
            torch.arange(num_rows + 1, dtype=torch.int32, device=z.device),
            row_start,
            read_slots,
            write_slots,
        )
        convolved = causal_conv1d(columns, conv_weight, conv_bias, conv_state, *rows)
        x, B, C = torch.split(convolved, [d_inner, num_groups * state_size, num_groups * state_size], dim=1)
        heads, groups = (num_heads, head_dim), (num_groups, state_size)
        y = ssm_scan(
            torch.unflatten(x, 1, heads), torch.unflatten(B, 1, groups), torch.unflatten(C, 1, groups), dt,
            A, D, dt_bias, ssm_state, *rows, dt_min, dt_max, max_query_len=1,
        )  # fmt: skip
        return gated_rms_norm(y.flatten(1), z, norm_weight, norm_eps, d_inner // num_groups, out=out)
    result = output_like(op, out, (num_rows, d_inner), z)
    kernels, stream = target_of(z)
    # fmt: off
    kernels.mamba_decode(
        num_rows, num_heads, head_dim, num_groups, state_size, width,
        z.data_ptr(), columns.data_ptr(), dt.data_ptr(), z.stride(0),
        conv_weight.data_ptr(), 0 if conv_bias is None else conv_bias.data_ptr(),
        A.data_ptr(), D.data_ptr(), dt_bias.data_ptr(), dt_min, dt_max, norm_weight.data_ptr(), norm_eps,
        conv_state.data_ptr(), conv_state.stride(0), ssm_state.data_ptr(), ssm_state.stride(0),
        row_start.data_ptr(), read_slots.data_ptr(), write_slots.data_ptr(),
        result.data_ptr(), dtype_code(op, "z", z), stream,
    )
    # fmt: on
    return result


def _check(
    op: str,
    z: Tensor,
    columns: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    norm_weight: Tensor,
) -> None:
    num_rows, num_slots = z.shape[0], conv_state.shape[0]
    _, num_heads, head_dim, state_size = ssm_state.shape
    width, conv_dim = conv_weight.shape
    d_inner = num_heads * head_dim
    if conv_dim <= d_inner or (conv_dim - d_inner) % (2 * state_size):
        raise ValueError(
            f"{op}: conv_weight must have H * P + 2 G N columns, H * P = {d_inner}, N = {state_size}; got {conv_dim}"
        )
    check_shape(op, "z", z, (num_rows, d_inner), "R, H * P")
    check_shape(op, "columns", columns, (num_rows, conv_dim), "R, conv_dim")
    check_shape(op, "dt", dt, (num_rows, num_heads), "R, H")
    check_shape(op, "conv_state", conv_state, (num_slots, width - 1, conv_dim), "num_slots, W - 1, conv_dim")
    check_vector(op, "norm_weight", norm_weight, d_inner, "H * P")
    for name, tensor in (("z", z), ("columns", columns), ("dt", dt), ("conv_state", conv_state)):
        check_inner_dense(op, name, tensor)
        check_same_dtype(op, name, tensor, z.dtype)
    check_same_dtype(op, "ssm_state", ssm_state, torch.float32)


def _is_fused(
    z: Tensor,
    columns: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    norm_weight: Tensor,
) -> bool:
    """Whether the one-launch kernel takes these tensors."""
    vectors = [z, columns, conv_weight, conv_state, ssm_state, norm_weight]
    if conv_bias is not None:
        vectors.append(conv_bias)
    has_one_stride = z.shape[0] <= 1 or z.stride(0) == columns.stride(0) == dt.stride(0)
    fits = conv_weight.shape[0] == FUSED_WIDTH and ssm_state.shape[3] in FUSED_STATE_SIZES
    fits = fits and ssm_state.shape[2] % FUSED_HEAD_DIM_MULTIPLE == 0
    return z.is_cuda and has_one_stride and fits and all(_is_vectorisable(tensor) for tensor in vectors)


def _is_vectorisable(tensor: Tensor) -> bool:
    """Rows of the last dimension can be read in 16-byte pieces."""
    elements = VECTOR_BYTES // tensor.element_size()
    strides = (*tensor.stride()[:-1], tensor.shape[-1])
    return tensor.data_ptr() % VECTOR_BYTES == 0 and all(stride % elements == 0 for stride in strides)
