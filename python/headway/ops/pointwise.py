"""Element-wise activations of MLPs and experts."""

from __future__ import annotations

from torch import Tensor

from headway.errors import ArgumentError
from headway.ops.backend import target_of
from headway.ops.checks import check_inner_dense, dtype_code, output_like
from headway.ops.records import ACTIVATION_CODES, ActivationKind


def activation(x: Tensor, kind: ActivationKind, is_gated: bool, *, out: Tensor | None = None) -> Tensor:
    """act(gate) * up with x = [gate | up] when is_gated, else act(x).

    Args:
        x: [T, 2F] when gated, else [T, F]; tokens may be strided.
        kind: silu, relu2 (the square of relu) or gelu (exact, by erf).
        is_gated: whether x holds gate and up side by side.
        out: [T, F] contiguous.

    Returns:
        [T, F] in x's dtype.
    """
    op = "activation"
    num_tokens, columns = x.shape
    if is_gated and columns % 2:
        raise ArgumentError(f"{op}: x must have an even number of columns when gated, got {columns}")
    check_activation(op, "kind", kind)
    width = columns // 2 if is_gated else columns
    check_inner_dense(op, "x", x)
    result = output_like(op, out, (num_tokens, width), x)
    kernels, stream = target_of(x)
    kernels.activation(
        num_tokens,
        width,
        x.data_ptr(),
        x.stride(0),
        result.data_ptr(),
        ACTIVATION_CODES[kind],
        is_gated,
        dtype_code(op, "x", x),
        stream,
    )
    return result


def check_activation(op: str, argument: str, kind: str) -> None:
    if kind not in ACTIVATION_CODES:
        raise ArgumentError(f"{op}: {argument} must be one of {', '.join(ACTIVATION_CODES)}, got {kind!r}")
