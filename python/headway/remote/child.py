"""An engine's own process from its first line to its exit code: it says hello, makes the engine, runs it.

The process ends when its server does, whatever state it is in: a thread hears the end of stdin, and on Linux the kernel
kills the process, a stopped one too.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from headway.errors import HeadwayError
from headway.loop import run
from headway.remote.faults import to_fault
from headway.remote.host import LAST_WORDS_S, EngineHost, HostedEngine, T
from headway.remote.link import Link
from headway.remote.messages import (
    MAX_ENGINE_FRAME_BYTES,
    MAX_SERVER_FRAME_BYTES,
    PROTOCOL_VERSION,
    EngineMessage,
    Failed,
    Hello,
    Loading,
    Ready,
    Start,
    to_frames,
)
from headway.remote.watchdog import Watchdog

logger = logging.getLogger("headway")

EXIT_FAILED, EXIT_ORPHANED = 1, 3
PR_SET_PDEATHSIG = 1  # linux/prctl.h
Progress = Callable[[int, int], None]
Make = Callable[[dict[str, Any], Progress], HostedEngine[T]]


def main(make: Make[T]) -> None:
    """Does not return. `make` turns the start record's options into an engine."""
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    _show_log(start.log_level)
    Watchdog.prepare()
    _end_with_parent(start)
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(
            sig, signal.SIG_IGN
        )  # sent to a whole group, they mean the server: it ends this process
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = Link.connected(context, start.address, MAX_SERVER_FRAME_BYTES)
    _say(link, Hello(PROTOCOL_VERSION, start.secret))
    try:
        code = _run(link, start, make)
    except HeadwayError as error:
        code = _fail(link, error)
    except Exception as error:
        logger.exception("the engine could not start")
        code = _fail(link, error)
    link.close(LAST_WORDS_S)
    context.destroy()
    logging.shutdown()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)  # a thread that hangs in a driver would be waited for otherwise


def _run(link: Link, start: Start, make: Make[T]) -> int:
    engine = make(start.options, lambda done, total: _say(link, Loading(done, total)))
    tokenizer, template = engine.tokenizer, engine.chat_template
    ready = Ready(
        info=engine.info,
        tokenizer_json=None if tokenizer is None else tokenizer.to_json(),
        special_tokens={} if tokenizer is None else tokenizer.special_tokens,
        template=None if template is None else template.source,
        template_tokens={} if template is None else template.special_tokens,
    )
    _say(link, ready)
    return run(_host(engine, link, start.watchdog_timeout_s))


async def _host(engine: HostedEngine[T], link: Link, watchdog_timeout_s: float) -> int:
    return await EngineHost(engine, link, watchdog_timeout_s).run()


def _fail(link: Link, error: Exception) -> int:
    _say(link, Failed(to_fault(error)))
    return EXIT_FAILED


def _say(link: Link, message: EngineMessage) -> None:
    for frame in to_frames([message], MAX_ENGINE_FRAME_BYTES)[0]:
        link.send(frame)


def _show_log(level: int) -> None:
    """On stderr, as the server's own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)


def _end_with_parent(start: Start) -> None:
    if start.dies_with_parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != start.parent_pid:  # it was quicker
            os._exit(EXIT_ORPHANED)
    threading.Thread(target=_wait_for_the_end, name="headway-parent", daemon=True).start()


def _wait_for_the_end() -> None:
    while os.read(0, 4096):
        pass
    os._exit(EXIT_ORPHANED)
