"""A server on a real socket, in a thread of this process, and plain ways to talk to it."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from headway.loop import new_loop
from headway.server.client import EngineClient
from headway.server.serve import HeadwayServer, bind
from headway.server.settings import ServerSettings
from headway.server.state import ServerState

WAIT_S = 15.0  # for what must come true


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return dict(error)

    @property
    def events(self) -> list[Any]:
        """Of a stream, framed to the byte; without [DONE], which must be the last."""
        text = self.body.decode()
        assert text.endswith("data: [DONE]\n\n")
        parts = text.split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""]
        assert all(part.startswith("data: {") and "\n" not in part for part in parts[:-2])
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


class Live:
    """A running server. `client` is its engine; `server` may be told to stop."""

    def __init__(self, client: EngineClient, settings: ServerSettings) -> None:
        self.client = client
        self._socket = bind(settings)
        self.port: int = self._socket.getsockname()[1]
        self.host = "127.0.0.1"
        self.state = ServerState(client, settings)
        self.server = HeadwayServer(self.state)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.serve([self._socket])
            await self.client.close()

        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = True
        self.join()

    def join(self) -> None:
        self._thread.join(timeout=30)
        assert not self._thread.is_alive(), "the server did not end"
        self.state.close()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def on_loop(self, work: Callable[[], Any]) -> None:
        """Runs work on the server's loop, where the fake engine's events live."""
        self.loop.call_soon_threadsafe(work)

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.request("POST", path, body, headers)

    def request(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Answer:
        """body: bytes as they are, else JSON. A header None leaves the default out."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        try:
            all_headers = {"content-type": "application/json"} if data is not None else {}
            all_headers |= {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, data, all_headers)
            reply = connection.getresponse()
            found = {name.lower(): value for name, value in reply.getheaders()}
            return Answer(reply.status, found, reply.read())
        finally:
            connection.close()

    def raw(self, data: bytes, *, timeout_s: float = 10.0) -> bytes:
        """Sends bytes as they are and reads until the server closes or has nothing more to say."""
        with self.connect(timeout_s) as sock:
            sock.sendall(data)
            return read_all(sock)

    def connect(self, timeout_s: float = 10.0) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=timeout_s)


def read_all(sock: socket.socket) -> bytes:
    pieces = []
    try:
        while piece := sock.recv(65536):
            pieces.append(piece)
    except (TimeoutError, ConnectionError):
        pass
    return b"".join(pieces)


def wait_until(is_true: Callable[[], bool], timeout_s: float | None = None) -> None:
    deadline_s = time.monotonic() + (WAIT_S if timeout_s is None else timeout_s)
    while not is_true():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.005)


@contextmanager
def live(client: EngineClient, **settings: Any) -> Iterator[Live]:
    found = Live(client, ServerSettings(**{"port": 0, **settings}))
    found.start()
    try:
        yield found
    finally:
        found.stop()
