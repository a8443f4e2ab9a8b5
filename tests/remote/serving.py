"""`headway serve` around `tests.remote.hosted`, as a process of its own, and what a test does with one."""

from __future__ import annotations

import http.client
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headway.cli.console import show_log
from headway.remote.client import RemoteEngine
from headway.server.meter import RequestMeter
from headway.server.serve import bind, run_server
from headway.server.settings import ServerSettings

_PATH = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); "
HOSTED = (
    sys.executable,
    "-c",
    _PATH + "from headway.remote.child import main; from tests.remote.hosted import make; main(make)",
)
_SERVING = (sys.executable, "-c", _PATH + "from tests.remote.serving import main; sys.exit(main())")
LONG = {"prompt": "x", "max_tokens": 3000, "stream": True}


def main() -> int:
    """Of the server's process: options of the engine, the server's settings, bytes to leak with each request."""
    show_log(logging.INFO)
    options, settings = json.loads(sys.argv[1]), ServerSettings(port=0, **json.loads(sys.argv[2]))
    if num_leaked_bytes := int(sys.argv[3]):
        plant_leak(num_leaked_bytes)
    with bind(settings) as sock:
        client = RemoteEngine(
            command=HOSTED,
            watchdog_timeout_s=settings.watchdog_timeout_s,
            heartbeat_timeout_s=settings.heartbeat_timeout_s,
            **options,
        )
        return run_server(client, settings, sock)


def plant_leak(num_bytes: int) -> None:
    """With every request that ends well."""
    kept: list[bytes] = []
    count_request = RequestMeter.count_request

    def count_and_keep(*args: Any) -> None:
        kept.append(bytes(num_bytes))
        count_request(*args)

    RequestMeter.count_request = count_and_keep  # type: ignore[method-assign]


class Serving:
    """A running server's process, its port and its engine's process. What it wrote is read at the end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log = ""
        self._connections: list[http.client.HTTPConnection] = []
        self._replies: list[http.client.HTTPResponse] = []
        self.engine_pid = self.port = 0

    def start(self) -> None:
        """Returns when it serves."""
        self.engine_pid = int(self._wait_for(r"the engine runs in process (\d+)\n"))
        self.port = int(self._wait_for(r"serving .* at http://127\.0\.0\.1:(\d+)\n"))

    def post(self, body: dict[str, Any]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        self._connections.append(connection)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        reply = connection.getresponse()
        self._replies.append(reply)
        return reply

    def get_status(self, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        reply = connection.getresponse()
        reply.read()
        connection.close()
        return reply.status

    def end(self) -> int:
        """Its exit code, once it has ended; `log` is then complete."""
        code = self.process.wait(timeout=60)
        assert self.process.stderr is not None
        self.log += self.process.stderr.read()
        return code

    def close(self) -> None:
        for half in (*self._replies, *self._connections):
            half.close()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _wait_for(self, pattern: str) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            if found := re.fullmatch(pattern, line):
                return found[1]
        raise AssertionError(f"it ended without serving: {self.log}")


@contextmanager
def serving(options: dict[str, Any], *, num_leaked_bytes: int = 0, **settings: Any) -> Iterator[Serving]:
    arguments = [json.dumps(options), json.dumps(settings), str(num_leaked_bytes)]
    process = subprocess.Popen([*_SERVING, *arguments], stderr=subprocess.PIPE, text=True)
    server = Serving(process)
    try:
        server.start()
        yield server
    finally:
        process.kill()
        process.wait()
        server.close()
