"""How the processes of a server run their event loops, and how seldom they look for garbage."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from typing import TypeVar

T = TypeVar("T")

# Neither an answer nor a refusal leaves a cycle behind (tests/remote/test_garbage.py), so collecting finds nothing and
# only looks: at the default of 700 new objects that was a tenth of a short request.
YOUNG_OBJECTS = 20_000


def new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's; asyncio's own where that is not to be had, as on Windows."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def run(work: Coroutine[None, None, T]) -> T:
    """To its end, in a process that does nothing else: settings of the whole interpreter are changed."""
    gc.collect()
    gc.freeze()  # what was imported and loaded stays, and need not be looked through
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(work)
