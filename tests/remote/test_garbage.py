"""No request leaves cycles behind, answered or refused: collecting those of a thousand stopped a server for 150 ms."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from headway.remote.client import RemoteEngine
from headway.server.client import EngineRequest
from tests.remote.serving import HOSTED
from tests.server.live import Live, live

NUM_REQUESTS = 40
MAX_LEFT = NUM_REQUESTS // 4  # other tests of this process may leave some


@contextmanager
def serving(**options: Any) -> Iterator[Live]:
    with live(RemoteEngine(command=HOSTED, **options)) as server:
        yield server


def num_requests_left(server: Live, body: dict[str, Any], status: bytes) -> int:
    """Of so many equal ones on one connection: those that only a collection frees."""
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    request = head + b"content-length: %d\r\n\r\n" % len(data) + data
    with server.connect() as sock:
        for i in range(NUM_REQUESTS + 5):
            if i == 5:  # what is made once is there by now
                gc.collect()
                gc.disable()
            sock.sendall(request)
            got = b""
            while not got.endswith((b"}", b"0\r\n\r\n")):
                got += sock.recv(65536)
            assert got.split(b" ")[1] == status
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    gc.enable()
    num_left = sum(isinstance(found, EngineRequest) for found in gc.garbage)
    gc.garbage.clear()
    return num_left


FINE = {"prompt": "x", "max_tokens": 2}


@pytest.mark.parametrize(
    "more", [{}, {"stream": True}, {"prompt": ["x", "y"]}], ids=["whole", "stream", "two"]
)
def test_answers_leave_no_cycles(more: dict[str, Any]) -> None:
    with serving() as server:
        assert num_requests_left(server, {**FINE, **more}, b"200") <= MAX_LEFT


@pytest.mark.parametrize(
    "more", [{}, {"stream": True}, {"prompt": ["x", "y"]}], ids=["whole", "stream", "two"]
)
def test_refusals_leave_no_cycles(more: dict[str, Any]) -> None:
    with serving(max_waiting=0) as server:
        assert num_requests_left(server, {**FINE, **more}, b"503") <= MAX_LEFT


def test_errors_that_are_kept_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headway.remote.reading.Reading._taken_error", lambda reading: reading._error)
    with serving(max_waiting=0) as server:
        assert num_requests_left(server, FINE, b"503") > MAX_LEFT
