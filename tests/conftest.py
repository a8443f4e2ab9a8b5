"""What every test may ask for: a device, the shipped model, and the same random numbers at every run."""

from __future__ import annotations

import importlib.util
import random
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import headway

HAS_HYPOTHESIS = importlib.util.find_spec("hypothesis") is not None
SEED = 20_240_917

if HAS_HYPOTHESIS:
    from hypothesis import HealthCheck, settings

    # Deadlines measure the machine, not the code. Examples are drawn from the test's own name: a failure comes back.
    slow_machine = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings.register_profile("headway", deadline=None, derandomize=True, suppress_health_check=slow_machine)
    settings.load_profile("headway")


def pytest_report_header() -> list[str]:
    return [] if HAS_HYPOTHESIS else ["hypothesis is not installed: the test files that use it are left out"]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    is_module = collection_path.suffix == ".py" and collection_path.name != "conftest.py"
    if HAS_HYPOTHESIS or not is_module:
        return None
    return "hypothesis import" in collection_path.read_text() or None


@cache
def has_gpu() -> bool:
    """Asked only when a test needs one: most runs never import torch here."""
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("no CUDA device here")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device there is: a test that takes it runs once on each."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """The checkpoint that is installed with the package."""
    folder = Path(headway.__file__).parent / "assets" / "tiny"
    assert (folder / "config.json").is_file(), f"{folder} has no model: the package is not installed whole"
    return folder
