"""Servers for a whole file of tests: one with the shipped model, one with an engine that says what it is told."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.server.live import Live

# Without the extra these tests have nothing to test.
_IS_MISSING = any(
    importlib.util.find_spec(name) is None
    for name in ("starlette", "uvicorn", "httptools", "msgspec", "prometheus_client")
)
collect_ignore_glob = ["test_*.py"] if _IS_MISSING else []


@pytest.fixture(scope="module")
def model_server(tiny_model_dir: Path) -> Iterator[Live]:
    from headway.aio import AsyncLLM
    from tests.server.live import live

    settings = {"max_num_seqs": 8, "max_model_len": 512, "generation_config": "none"}
    # Without cached prefixes every block and slot is free again when nobody is being answered.
    llm = AsyncLLM(tiny_model_dir, device="cpu", enable_prefix_caching=False, **settings)
    with live(llm, served_model_name=["tiny", "also-tiny"], enable_dev_endpoints=True) as found:
        yield found


@pytest.fixture(scope="module")
def fake_server() -> Iterator[Live]:
    from tests.server.fake_engine import FakeEngine
    from tests.server.live import live

    with live(FakeEngine(), enable_dev_endpoints=True) as found:
        yield found
