"""Argument checks of the ops: one comparison each, a message that names op, argument, dimension, expected and got."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.errors import ArgumentError
from headway.ops.records import DTYPE_CODES


def check_shape(op: str, argument: str, tensor: Tensor, expected: tuple[int, ...], letters: str) -> None:
    """letters names the dimensions, such as "T, C"; the last dimension must be contiguous."""
    if tensor.shape != expected:
        raise ArgumentError(
            f"{op}: {argument} must have shape [{letters}] = {list(expected)}, got {list(tensor.shape)}"
        )


def check_dense(op: str, argument: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ArgumentError(f"{op}: {argument} must be contiguous, got strides {tensor.stride()}")


def check_inner_dense(op: str, argument: str, tensor: Tensor) -> None:
    """Tokens may lie apart (a slice of a wider tensor), but what belongs to one token must not."""
    if tensor.is_contiguous():
        return
    expected = 1
    for dim in range(tensor.dim() - 1, 0, -1):
        size = tensor.shape[dim]
        if size > 1 and tensor.stride(dim) != expected:
            raise ArgumentError(
                f"{op}: {argument} must be contiguous after its first dimension, got strides {tensor.stride()}"
            )
        expected *= size


def check_vector(op: str, argument: str, tensor: Tensor, size: int, letter: str) -> None:
    """A contiguous [size] tensor."""
    if tensor.dim() != 1 or tensor.shape[0] != size or not tensor.is_contiguous():
        raise ArgumentError(
            f"{op}: {argument} must be a contiguous [{letter}] = [{size}] tensor, got shape "
            f"{list(tensor.shape)} and strides {tensor.stride()}"
        )


def check_index(op: str, argument: str, tensor: Tensor, size: int, letter: str) -> None:
    """A contiguous int32 [size] tensor."""
    if tensor.dtype != torch.int32:
        raise ArgumentError(f"{op}: {argument} must be int32, got {tensor.dtype}")
    check_vector(op, argument, tensor, size, letter)


def check_same_dtype(op: str, argument: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ArgumentError(f"{op}: {argument} must be {dtype}, got {tensor.dtype}")


def dtype_code(op: str, argument: str, tensor: Tensor) -> int:
    """The kernels' number for tensor's dtype."""
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None or (code == 2 and tensor.is_cpu):
        raise ArgumentError(
            f"{op}: {argument} must be float32 or bfloat16 (float16 on a GPU), got {tensor.dtype}"
        )
    return code


def state_dtype_code(op: str, argument: str, tensor: Tensor) -> int:
    """The kernels' number for the dtype of states in slots."""
    if tensor.dtype not in (torch.float32, torch.float16):
        raise ArgumentError(f"{op}: {argument} must be float32 or float16, got {tensor.dtype}")
    return DTYPE_CODES[tensor.dtype]


def output_like(op: str, out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """out after its checks, or a new contiguous tensor of this shape with like's dtype and device."""
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if out.shape != shape or out.dtype != like.dtype or not out.is_contiguous():
        raise ArgumentError(
            f"{op}: out must be a contiguous {like.dtype} tensor of shape {list(shape)}, got {out.dtype} "
            f"{list(out.shape)} with strides {out.stride()}"
        )
    return out
