"""Fixtures of tests on a GPU."""

from __future__ import annotations

import pytest
import torch

from headway.layers.linear import Linear
from tests.engine.gpu import MAX_STEP_TOKENS


@pytest.fixture
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.fixture
def invariant_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product in the shape of the largest step: the BLAS chooses its kernels by shape, and so its roundings."""
    product = Linear.__call__

    def padded(self: Linear, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.new_zeros(MAX_STEP_TOKENS, x.shape[1])
        rows[: x.shape[0]] = x
        result = product(self, rows)[: x.shape[0]]
        return result if out is None else out.copy_(result)

    monkeypatch.setattr(Linear, "__call__", padded)
    monkeypatch.setattr(Linear, "into", padded)
    monkeypatch.setattr(Linear, "onto", lambda self, x, total: total.add_(padded(self, x)))
