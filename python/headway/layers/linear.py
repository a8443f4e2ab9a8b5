"""Matrix products, which are torch's own: its BLAS, or on a CPU that has it, oneDNN over weights packed at load.

A few rows against a packed matrix, the shape of a decode step, take half the time they take in the BLAS.
"""

from __future__ import annotations

import platform
from functools import cache

import torch


class Linear:
    """y = x W^T + b with W [out, in] and b [out] or None. Holds the packed matrix instead of the plain one."""

    __slots__ = ("_bias", "_packed", "_weight_t")

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, may_pack: bool = True
    ) -> None:
        self._bias = bias
        is_packed = may_pack and _can_pack(weight)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight) if is_packed else None
        self._weight_t = weight.t() if self._packed is None else None  # [in, out]

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] -> [T, out], in `out` or in memory of its own, whichever costs no copy."""
        if self._weight_t is None:
            return self._product(x)
        if self._bias is None:
            return torch.mm(x, self._weight_t, out=out)
        return torch.addmm(self._bias, x, self._weight_t, out=out)

    def into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> out [T, out]."""
        return self(x, out) if self._packed is None else out.copy_(self._product(x))

    def onto(self, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """total [T, out] += x W^T, in place; for a linear without bias."""
        if self._weight_t is None:
            return total.add_(self._product(x))
        return total.addmm_(x, self._weight_t)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return product


def _can_pack(weight: torch.Tensor) -> bool:
    if not weight.is_cpu or not _has_onednn():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


@cache
def _has_onednn() -> bool:
    """The packed product is tuned, and tested here, on x86 alone."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
