"""Matrix products. On x86 CPUs over weights packed at load: float32 in panels for our own kernel, whose results do not
depend on the batch, bfloat16 by oneDNN. Everywhere else they are torch's.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Protocol

import torch

from headway import ops


class Linear:
    """y = x W^T + b with W [out, in] and b [out] or None. Holds the packed matrix instead of the plain one."""

    __slots__ = ("_matrix",)

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, may_pack: bool = True
    ) -> None:
        packed = _pack(weight, bias) if may_pack and weight.is_cpu and _is_x86() else None
        self._matrix: _Matrix = packed or _PlainMatrix(weight, bias)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] -> [T, out], in `out` or in memory of its own, whichever costs no copy."""
        return self._matrix.product(x, out)

    def into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> out [T, out]."""
        result = self._matrix.product(x, out)
        return result if result is out else out.copy_(result)

    def onto(self, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """total [T, out] += x W^T, in place; for a linear without bias."""
        return self._matrix.add_product(x, total)


class _Matrix(Protocol):
    def product(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor: ...
    def add_product(self, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor: ...


class _PlainMatrix:
    """Torch's BLAS over the weight as it is."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight_t, self._bias = weight.t(), bias  # [in, out], [out]

    def product(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if self._bias is None:
            return torch.mm(x, self._weight_t, out=out)
        return torch.addmm(self._bias, x, self._weight_t, out=out)

    def add_product(self, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return total.addmm_(x, self._weight_t)


class _PanelMatrix:
    """Our own kernel: a decode step of a few rows takes half the time it takes in oneDNN, long prompts a tenth more."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed, self._bias = ops.pack_linear(weight), bias

    def product(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        return ops.linear(x, self._packed, self._bias, out=out)

    def add_product(self, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self._packed, out=total, is_added=True)


class _OneDnnMatrix:
    """oneDNN over a matrix in its own layout; allocates what it returns."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed, self._bias = torch.ops.mkldnn._reorder_linear_weight(weight), bias

    def product(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return result

    def add_product(self, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return total.add_(self.product(x, None))


def _pack(weight: torch.Tensor, bias: torch.Tensor | None) -> _Matrix | None:
    """The packed form of a CPU weight, where there is one for its dtype."""
    if weight.dtype == torch.float32:
        return _PanelMatrix(weight, bias)
    if weight.dtype == torch.bfloat16 and _has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return _OneDnnMatrix(weight, bias)
    return None


def _is_x86() -> bool:
    """The packed products are tuned, and tested here, on x86 alone."""
    return platform.machine().lower() in ("x86_64", "amd64")


@cache
def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
