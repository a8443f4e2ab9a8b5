"""Ops run on every device there is, and on a CPU at every SIMD level that it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from headway import _cpu

LEVELS = ("avx512", "avx2", "plain")


@contextmanager
def simd_level(name: str) -> Iterator[None]:
    levels = _cpu.simd_levels()
    if name not in levels:
        pytest.skip(f"this processor or build has no {name}")
    _cpu.set_simd_level(name)
    yield
    _cpu.set_simd_level(levels[0])


@pytest.fixture(params=LEVELS)
def cpu_level(request: pytest.FixtureRequest) -> Iterator[str]:
    with simd_level(request.param):
        yield request.param


@pytest.fixture(params=[*LEVELS, pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "cuda":
        with simd_level(request.param):
            yield "cpu"
    elif torch.cuda.is_available():
        yield "cuda"
    else:
        pytest.skip("no CUDA device here")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen
