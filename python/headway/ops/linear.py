"""Matrix products over weights packed for few tokens. CPU, float32; elsewhere they are torch's."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from headway.ops.backend import target_of
from headway.ops.checks import check_inner_dense, check_same_dtype, check_vector

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
        raise ValueError(
            f"{op}: x must have shape [T, in] with in = {matrix.num_inputs}, got {list(x.shape)}"
        )
    check_same_dtype(op, "x", x, torch.float32)
    check_inner_dense(op, "x", x)
    if bias is not None:
        check_vector(op, "bias", bias, matrix.num_outputs, "out")
        check_same_dtype(op, "bias", bias, torch.float32)
    result = _output(x, matrix, out, is_added)
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


def _output(x: Tensor, matrix: PackedMatrix, out: Tensor | None, is_added: bool) -> Tensor:
    shape = (x.shape[0], matrix.num_outputs)
    if out is None:
        if is_added:
            raise ValueError("linear: out must be given where the product is added to it")
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.shape != shape or out.dtype != x.dtype or out.data_ptr() == x.data_ptr():
        raise ValueError(
            f"linear: out must be another {x.dtype} tensor of shape {list(shape)}, got {out.dtype} {list(out.shape)}"
        )
    check_inner_dense("linear", "out", out)
    return out
