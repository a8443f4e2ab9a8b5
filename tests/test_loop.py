"""The event loop of a server's processes, with uvloop and without."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys

import pytest

from headway.loop import new_loop


def test_a_loop_is_had_without_uvloop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert type(runner.get_loop()).__module__.startswith("asyncio")
        assert runner.run(asyncio.sleep(0, 7)) == 7


def test_uvloop_is_taken_where_it_is() -> None:
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert isinstance(runner.get_loop(), uvloop.Loop)


def test_a_process_that_runs_a_server_looks_for_garbage_seldom() -> None:
    """In a process of its own: the settings are the whole interpreter's."""
    source = (
        "import asyncio, gc; from headway.loop import run; "
        "print(run(asyncio.sleep(0, 7)), gc.get_threshold()[0], gc.get_freeze_count() > 1000)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    result, threshold, is_frozen = done.stdout.split()
    assert (result, is_frozen) == ("7", "True")
    assert int(threshold) > gc.get_threshold()[0]
