"""Matrix products. On x86 CPUs over weights packed at load: float32 in panels for our own kernel, whose results do not
depend on the batch, bfloat16 by oneDNN. On a GPU, 16-bit products of few tokens are ours too. Everywhere else they are
torch's.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Final, Protocol

import torch

from headway import ops

# Sizes of the kernels for few tokens; rows count by multiprocessor.
MIN_SKINNY_BYTES: Final = 2**20  # smaller ones take a launch, whoever multiplies
MAX_SMALL_BYTES: Final = 16 * 2**20  # larger ones are streamed: csrc/cuda/skinny_linear_{warpgroup,short}.cu
SKINNY_GROUP_ROWS: Final = 40  # of a small matrix: kMaxTiles of csrc/cuda/skinny_linear.cu
MIN_STREAMED_ROWS: Final = 48  # of a large one; those with fewer are streamed by several panels at a time
SHORT_PANEL_COLUMNS: Final = 64  # whole panels only
MIN_SHORT_ROWS: Final = 20  # fewer are not measured within a step
# With fewer, more than 16 tokens cost what reading the matrix gains; with more, than 32.
MIN_TALL_ROWS: Final = 96


class Linear:
    """y = x W^T + b with W [out, in] and b [out] or None. Holds the packed matrix instead of the plain one.

    is_invariant: a token's result must not depend on the tokens beside it; for what `supports_invariance`.
    """

    __slots__ = ("_matrix",)

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        may_pack: bool = True,
        is_invariant: bool = False,
    ) -> None:
        may_pack = (may_pack or is_invariant) and weight.is_cpu and _is_x86()
        self._matrix: _Matrix = (_pack(weight, bias) if may_pack else None) or _plain(
            weight, bias, is_invariant
        )

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


class _SkinnyMatrix:
    """Our own kernel for the few tokens of a decode step, where it is the faster one; torch's BLAS for the rest."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, max_tokens: int) -> None:
        self._weight, self._bias = weight, bias
        self._plain = _PlainMatrix(weight, bias)
        self._max_tokens = max_tokens

    def product(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if self._is_skinny(x):
            return ops.skinny_linear(x, self._weight, self._bias, out=out)
        return self._plain.product(x, out)

    def add_product(self, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        if self._is_skinny(x):
            return ops.skinny_linear(x, self._weight, out=total, is_added=True)
        return self._plain.add_product(x, total)

    def _is_skinny(self, x: torch.Tensor) -> bool:
        return x.shape[0] <= self._max_tokens and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


class _InvariantMatrix:
    """Our own kernel for few tokens, whatever their number."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def product(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        return ops.skinny_linear(x, self._weight, self._bias, out=out)

    def add_product(self, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return ops.skinny_linear(x, self._weight, out=total, is_added=True)


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


def supports_invariance(device_type: str, dtype: torch.dtype) -> bool:
    """Whether there are products whose results do not depend on the batch, for matrices with rows of 8 n columns."""
    if device_type == "cuda":
        return dtype in (torch.bfloat16, torch.float16)
    return dtype == torch.float32 and _is_x86()


def _plain(weight: torch.Tensor, bias: torch.Tensor | None, is_invariant: bool) -> _Matrix:
    if not _may_be_skinny(weight):
        return _PlainMatrix(weight, bias)
    if is_invariant:
        return _InvariantMatrix(weight, bias)
    max_tokens = _max_skinny_tokens(weight)
    return _SkinnyMatrix(weight, bias, max_tokens) if max_tokens else _PlainMatrix(weight, bias)


def _may_be_skinny(weight: torch.Tensor) -> bool:
    """Whether the kernel for few tokens takes the matrix."""
    is_aligned = weight.shape[1] % 8 == 0 and weight.data_ptr() % 16 == 0 and weight.is_contiguous()
    return weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) and is_aligned


def _max_skinny_tokens(weight: torch.Tensor) -> int:
    """Tokens up to which the kernels for few tokens beat cuBLAS within a step on an H200 (docs/log.md)."""
    device = torch.cuda.get_device_properties(weight.device)
    rows = weight.shape[0] / device.multi_processor_count
    if weight.nbytes < MIN_SKINNY_BYTES:
        return 0
    if weight.nbytes > MAX_SMALL_BYTES:
        if device.major != 9:
            return 0
        if rows < MIN_STREAMED_ROWS:
            return 32 if rows >= MIN_SHORT_ROWS and weight.shape[1] % SHORT_PANEL_COLUMNS == 0 else 0
        return 32 if rows >= MIN_TALL_ROWS else 16
    return 16 if rows <= SKINNY_GROUP_ROWS else 8 if rows <= 2 * SKINNY_GROUP_ROWS else 0


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
