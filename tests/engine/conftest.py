"""Fixtures of tests on a GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
