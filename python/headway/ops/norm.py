"""RMS norms: plain, with the residual added first, and gated."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from headway.errors import ArgumentError
from headway.ops.backend import target_of
from headway.ops.checks import (
    check_dense,
    check_inner_dense,
    check_same_dtype,
    check_shape,
    check_vector,
    dtype_code,
    output_like,
)

MAX_GPU_ELEMENTS: Final = 32768  # normalised together; kMaxRowElements of csrc/cuda/common/row_shape.h


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """x / rms(x) * weight per token.

    Args:
        x: [T, C], tokens may be strided.
        weight: [C], same dtype.
        eps: added to the mean square.
        out: [T, C] contiguous; may be x itself.

    Returns:
        [T, C] in x's dtype, accumulated in float32.
    """
    return _rms_norm("rms_norm", x, None, weight, eps, 1.0, out)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    residual_scale: float = 1.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """residual += residual_scale * x in place, then the norm of the residual as stored.

    Args:
        x: [T, C], tokens may be strided.
        residual: [T, C] contiguous, same dtype; updated.
        weight: [C], same dtype.
        eps: added to the mean square.
        residual_scale: the model's residual multiplier.
        out: [T, C] contiguous; may be x itself.

    Returns:
        [T, C] in x's dtype.
    """
    check_shape("add_rms_norm", "residual", residual, tuple(x.shape), "T, C")
    check_dense("add_rms_norm", "residual", residual)
    check_same_dtype("add_rms_norm", "residual", residual, x.dtype)
    return _rms_norm("add_rms_norm", x, residual, weight, eps, residual_scale, out)


def _rms_norm(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    residual_scale: float,
    out: Tensor | None,
) -> Tensor:
    num_tokens, hidden = x.shape
    if not x.is_cpu and hidden > MAX_GPU_ELEMENTS:
        raise ArgumentError(
            f"{op}: x must have at most C = {MAX_GPU_ELEMENTS} columns on a GPU, got {hidden}"
        )
    check_inner_dense(op, "x", x)
    check_vector(op, "weight", weight, hidden, "C")
    check_same_dtype(op, "weight", weight, x.dtype)
    result = output_like(op, out, (num_tokens, hidden), x)
    kernels, stream = target_of(x)
    kernels.rms_norm(
        num_tokens,
        hidden,
        x.data_ptr(),
        x.stride(0),
        0 if residual is None else residual.data_ptr(),
        residual_scale,
        weight.data_ptr(),
        result.data_ptr(),
        eps,
        dtype_code(op, "x", x),
        stream,
    )
    return result


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, *, out: Tensor | None = None
) -> Tensor:
    """Norm of y * silu(z) over groups of channels, times weight.

    Args:
        y: [T, d] contiguous.
        z: [T, d], tokens may be strided (a slice of the in_proj output), same dtype.
        weight: [d], same dtype.
        eps: added to each group's mean square.
        group_size: channels normalised together; divides d.
        out: [T, d] contiguous; may be y itself.

    Returns:
        [T, d] in y's dtype, accumulated in float32.
    """
    op = "gated_rms_norm"
    num_tokens, hidden = y.shape
    check_dense(op, "y", y)
    check_shape(op, "z", z, (num_tokens, hidden), "T, d")
    check_inner_dense(op, "z", z)
    check_same_dtype(op, "z", z, y.dtype)
    check_vector(op, "weight", weight, hidden, "d")
    check_same_dtype(op, "weight", weight, y.dtype)
    if group_size < 1 or hidden % group_size:
        raise ArgumentError(f"{op}: group_size must divide d = {hidden}, got {group_size}")
    if not y.is_cpu and group_size > MAX_GPU_ELEMENTS:
        raise ArgumentError(f"{op}: group_size must be at most {MAX_GPU_ELEMENTS} on a GPU, got {group_size}")
    result = output_like(op, out, (num_tokens, hidden), y)
    kernels, stream = target_of(y)
    kernels.gated_rms_norm(
        num_tokens,
        hidden,
        group_size,
        y.data_ptr(),
        z.data_ptr(),
        z.stride(0),
        weight.data_ptr(),
        result.data_ptr(),
        eps,
        dtype_code(op, "y", y),
        stream,
    )
    return result
