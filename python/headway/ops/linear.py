"""Matrix products of few tokens: `linear` over packed weights (CPU, float32), `skinny_linear` over plain ones (CUDA,
16-bit). Others are torch's.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
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
)

MAX_SKINNY_TOKENS: Final = 16
PANEL: Final = 16  # outputs side by side; kLinearPanel of csrc/params/linear.h


class PackedMatrix(NamedTuple):
    """A matrix [num_outputs, num_inputs] in panels, zeros at its end."""

    panels: Tensor  # [ceil(num_outputs / PANEL), num_inputs, PANEL] float32
    num_outputs: int
    num_inputs: int


def pack_linear(weight: Tensor) -> PackedMatrix:
    """Packs weight [out, in] float32; a copy, the original is not needed any more."""
    check_same_dtype("pack_linear", "weight", weight, torch.float32)
    num_outputs, num_inputs = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -num_outputs % PANEL))
    panels = padded.view(-1, PANEL, num_inputs).transpose(1, 2).contiguous()
    return PackedMatrix(panels, num_outputs, num_inputs)


def linear(
    x: Tensor,
    matrix: PackedMatrix,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    is_added: bool = False,
) -> Tensor:
    """x W^T + bias. A token's result is bit-equal whatever tokens come with it.

    Args:
        x: [T, in] float32, tokens may be strided.
        matrix: W, packed.
        bias: [out] float32.
        out: [T, out], tokens may be strided; not x.
        is_added: adds the product to what out holds.

    Returns:
        [T, out] float32.
    """
    op = "linear"
    num_tokens, num_inputs = x.shape
    if num_inputs != matrix.num_inputs:
        raise ArgumentError(
            f"{op}: x must have shape [T, in] with in = {matrix.num_inputs}, got {list(x.shape)}"
        )
    if not x.is_cpu:
        raise ArgumentError(f"{op}: x must be on a CPU, got {x.device}")
    check_same_dtype(op, "x", x, torch.float32)
    check_inner_dense(op, "x", x)
    if bias is not None:
        check_vector(op, "bias", bias, matrix.num_outputs, "out")
        check_same_dtype(op, "bias", bias, torch.float32)
    result = _output(op, x, matrix.num_outputs, out, is_added)
    kernels, stream = target_of(x)
    kernels.linear(
        num_tokens,
        num_inputs,
        matrix.num_outputs,
        x.data_ptr(),
        x.stride(0),
        matrix.panels.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        result.data_ptr(),
        result.stride(0),
        is_added,
        stream,
    )
    return result


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    is_added: bool = False,
) -> Tensor:
    """x W^T + bias of few tokens. A token's result is bit-equal whatever tokens come with it.

    W is read once for every MAX_SKINNY_TOKENS tokens, of large ones on a Hopper GPU for every 32 or, if tall, 64.

    Args:
        x: [T, in] bfloat16 or float16 on a GPU, tokens may be strided; in and the stride are multiples of 8.
        weight: [out, in] in x's dtype.
        bias: [out] in x's dtype.
        out: [T, out], tokens may be strided; not x.
        is_added: adds the product to what out holds.

    Returns:
        [T, out] in x's dtype, rounded once.
    """
    op = "skinny_linear"
    num_tokens, num_inputs = x.shape
    num_outputs = weight.shape[0]
    if x.is_cpu or x.dtype not in (torch.bfloat16, torch.float16):
        raise ArgumentError(f"{op}: x must be bfloat16 or float16 on a GPU, got {x.dtype} on {x.device}")
    if num_inputs % 8 or x.stride(0) % 8 or x.data_ptr() % 16 or weight.data_ptr() % 16:
        raise ArgumentError(
            f"{op}: x and weight must begin at multiples of 16 bytes, in and x's token stride be multiples of 8, got "
            f"in = {num_inputs} and {x.stride(0)}"
        )
    check_inner_dense(op, "x", x)
    check_shape(op, "weight", weight, (num_outputs, num_inputs), "out, in")
    check_dense(op, "weight", weight)
    check_same_dtype(op, "weight", weight, x.dtype)
    if bias is not None:
        check_vector(op, "bias", bias, num_outputs, "out")
        check_same_dtype(op, "bias", bias, x.dtype)
    result = _output(op, x, num_outputs, out, is_added)
    kernels, stream = target_of(x)
    kernels.skinny_linear(
        num_tokens,
        num_inputs,
        num_outputs,
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        result.data_ptr(),
        result.stride(0),
        is_added,
        dtype_code(op, "x", x),
        stream,
    )
    return result


def _output(op: str, x: Tensor, num_outputs: int, out: Tensor | None, is_added: bool) -> Tensor:
    shape = (x.shape[0], num_outputs)
    if out is None:
        if is_added:
            raise ArgumentError(f"{op}: out must be given where the product is added to it")
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.shape != shape or out.dtype != x.dtype or out.data_ptr() == x.data_ptr():
        raise ArgumentError(
            f"{op}: out must be another {x.dtype} tensor of shape {list(shape)}, got {out.dtype} {list(out.shape)}"
        )
    check_inner_dense(op, "out", out)
    return out
