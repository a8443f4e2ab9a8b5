"""Without the extra `serve` there is no process to speak to."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_IS_MISSING = any(
    importlib.util.find_spec(name) is None for name in ("zmq", "msgspec", "starlette", "uvicorn")
)
collect_ignore_glob = ["test_*.py"] if _IS_MISSING else []


@pytest.fixture
def short_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory that new ones are made in, with a name that a socket may have."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)
