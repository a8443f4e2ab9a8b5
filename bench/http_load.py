"""Load for a server at little cost to the cores that it shares: plain sockets, one thread, no client library.

Knows as much HTTP as Headway's own replies need: a Content-Length, or a stream of events that ends with [DONE].
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from typing import Any

HEAD = "{} {} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"
MAX_READ_BYTES = 1 << 18
STREAM_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
HEALTH_INTERVAL_S = 0.05


def request_bytes(body: dict[str, Any] | None, path: str = "/v1/completions") -> bytes:
    """A POST of the body; without one, a GET."""
    data = b"" if body is None else json.dumps(body).encode()
    return HEAD.format("GET" if body is None else "POST", path, len(data)).encode() + data


def for_seconds(request: bytes, seconds: float) -> Iterator[bytes]:
    """The same request again and again."""
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        yield request


@dataclass(slots=True)
class Answered:
    """What came back: how long each reply took from its request to its end, by status, and events with a choice."""

    times_s: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    num_events: int = 0

    @property
    def num_replies(self) -> int:
        return sum(map(len, self.times_s.values()))


class Client:
    """One connection that asks again as soon as it is answered."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._got = b""
        self._length: int | None = None  # of the reply; 0: a stream
        self._begin_s = 0.0

    def ask(self, request: bytes) -> None:
        self._got, self._length, self._begin_s = b"", None, time.perf_counter()
        self.socket.sendall(request)

    def read(self, answered: Answered) -> bool:
        """Takes what has come. True when that ended the reply."""
        piece = self.socket.recv(MAX_READ_BYTES)
        assert piece, "the server closed the connection"
        if self._length is None:
            self._got += piece
            self._length = reply_length(self._got)
        elif self._length:
            self._got += piece
        else:
            self._got = self._got[:12] + (self._got[12:] + piece)[-len(STREAM_END) :]
        if self._length == 0:
            answered.num_events += piece.count(b"data: {")
        if self._length is None or not self._is_whole():
            return False
        answered.times_s[int(self._got[9:12])].append(time.perf_counter() - self._begin_s)
        return True

    def _is_whole(self) -> bool:
        return len(self._got) == self._length or (self._length == 0 and self._got.endswith(STREAM_END))


def reply_length(data: bytes) -> int | None:
    """Of a reply, head and body; 0 for a stream, None while the head is not complete."""
    head, end, _ = data.partition(b"\r\n\r\n")
    if not end:
        return None
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return len(head) + len(end) + int(length) if length else 0


def send_all(port: int, num_connections: int, requests: Iterable[bytes], pause_s: float = 0.0) -> Answered:
    """Each connection takes the next request pause_s after its last one was answered, until there are no more."""
    answered, left = Answered(), iter(requests)
    resting: deque[tuple[float, Client]] = deque()  # until when, who
    with selectors.DefaultSelector() as selector:
        for _, request in zip(range(num_connections), left, strict=False):
            client = Client(port)
            selector.register(client.socket, selectors.EVENT_READ, client)
            client.ask(request)
        while selector.get_map():
            wait_s = max(0.0, resting[0][0] - time.perf_counter()) if resting else None
            for key, _ in selector.select(wait_s):
                if key.data.read(answered):
                    resting.append((time.perf_counter() + pause_s, key.data))
            while resting and resting[0][0] <= time.perf_counter():
                client = resting.popleft()[1]
                if (next_one := next(left, None)) is not None:
                    client.ask(next_one)
                else:
                    selector.unregister(client.socket)
                    client.socket.close()
    return answered


class HealthWatch:
    """Asks for /health twenty times a second, in a process of its own. `end` returns the times in ms, sorted."""

    def __init__(self, port: int) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_watch_health, args=(port, theirs))
        self._process.start()
        self._pipe.recv()  # it is connected

    def end(self) -> list[float]:
        self._pipe.send(None)
        times: list[float] = self._pipe.recv()
        self._process.join()
        return times


def _watch_health(port: int, pipe: Pipe) -> None:
    client, answered, request = Client(port), Answered(), request_bytes(None, "/health")
    pipe.send(None)
    while not pipe.poll(HEALTH_INTERVAL_S):
        client.ask(request)
        while not client.read(answered):
            pass
    pipe.send(sorted(1e3 * taken_s for taken_s in answered.times_s[200]))
