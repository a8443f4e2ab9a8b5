"""Comparisons that say where two tensors part: the first index, both values, and how many differ."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the largest expected magnitude. Inputs are exact in both; the oracle computes in float64 and is not rounded.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def assert_close(actual: Tensor, expected: Tensor, what: str, *, tolerance: float | None = None) -> None:
    """actual agrees with expected within tolerance (the dtype's by default) times max(1, |expected|.max())."""
    assert actual.shape == expected.shape, (
        f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    )
    if actual.numel() == 0:
        return
    limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    got, want = actual.detach().cpu().double(), expected.detach().cpu().double()
    allowed = limit * max(1.0, float(want.abs().max()))
    _assert_none(~((got - want).abs() <= allowed), got, want, f"{what}: more than {allowed:.3g} apart")


def assert_bit_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Every bit is the same, NaN payloads and zero signs included."""
    assert actual.shape == expected.shape, (
        f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    )
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    got, want = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    _assert_none(got.view(bits) != want.view(bits), got, want, f"{what}: not bit-equal")


def _assert_none(wrong: Tensor, got: Tensor, want: Tensor, what: str) -> None:
    if not bool(wrong.any()):
        return
    index = tuple(int(i) for i in wrong.nonzero()[0])
    raise AssertionError(
        f"{what} at {int(wrong.sum())} of {wrong.numel()} places, first at {list(index)}: "
        f"got {got[index].item()!r}, expected {want[index].item()!r}"
    )
