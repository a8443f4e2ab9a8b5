"""Load for a server at little cost to the cores that it shares: plain sockets, one thread, no client library.

Knows as much HTTP as Headway's own replies need: a Content-Length, or chunks that end with [DONE].
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

HEAD = "{} {} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{}\r\n"
MAX_READ_BYTES = 1 << 18
STREAM_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"
HEALTH_INTERVAL_S = 0.05


def request_bytes(body: dict[str, Any] | None, path: str = "/v1/completions", headers: str = "") -> bytes:
    """`headers`: further lines, each with its line break."""
    data = b"" if body is None else json.dumps(body).encode()
    return HEAD.format("GET" if body is None else "POST", path, len(data), headers).encode() + data


def connect(port: int) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", port))
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def reply_length(data: bytes) -> int | None:
    """Of the first reply in data, head and body; None while its head is not complete."""
    head, end, _ = data.partition(b"\r\n\r\n")
    if not end:
        return None
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return len(head) + len(end) + int(length)


def short_requests(port: int, num_connections: int, body: dict[str, Any], seconds: float) -> int:
    """Each connection asks again as soon as it is answered. Returns how often that was."""
    data, count = request_bytes(body), 0
    pieces: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector:
        for _ in range(num_connections):
            connection = connect(port)
            selector.register(connection, selectors.EVENT_READ)
            pieces[connection] = b""
            connection.sendall(data)
        end_s = time.perf_counter() + seconds
        while pieces:
            is_over = time.perf_counter() >= end_s
            for key, _ in selector.select():
                connection = key.fileobj  # type: ignore[assignment]
                got = pieces[connection] + connection.recv(MAX_READ_BYTES)
                assert got.startswith(b"HTTP/1.1 200"), got
                length = reply_length(got)
                if length is None or len(got) < length:
                    pieces[connection] = got
                    continue
                count += 1
                pieces[connection] = b""
                if is_over:
                    selector.unregister(connection)
                    del pieces[connection]
                    connection.close()
                else:
                    connection.sendall(data)
    return count


def streams(port: int, num_streams: int, body: dict[str, Any]) -> int:
    """All streams from their begin to their end. Returns the number of events with a choice."""
    data, count = request_bytes({**body, "stream": True}), 0
    tails: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector:
        for _ in range(num_streams):
            connection = connect(port)
            selector.register(connection, selectors.EVENT_READ)
            tails[connection] = b""
            connection.sendall(data)
        while tails:
            for key, _ in selector.select():
                connection = key.fileobj  # type: ignore[assignment]
                piece = connection.recv(MAX_READ_BYTES)
                assert piece, tails[connection]
                count += piece.count(b"data: {")
                tails[connection] = tail = (tails[connection] + piece)[-len(STREAM_END) :]
                if tail == STREAM_END:
                    selector.unregister(connection)
                    del tails[connection]
                    connection.close()
    return count


class HealthWatch:
    """Asks for /health twenty times a second, in a process of its own. `end` returns the times in milliseconds."""

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
        return sorted(times)


def _watch_health(port: int, pipe: Connection) -> None:
    data, times = request_bytes(None, "/health"), list[float]()
    with connect(port) as connection:
        pipe.send(None)
        while not pipe.poll(HEALTH_INTERVAL_S):
            begin_s = time.perf_counter()
            connection.sendall(data)
            got = connection.recv(MAX_READ_BYTES)
            while (length := reply_length(got)) is None or len(got) < length:
                got += connection.recv(MAX_READ_BYTES)
            times.append(1e3 * (time.perf_counter() - begin_s))
    pipe.send(times)
