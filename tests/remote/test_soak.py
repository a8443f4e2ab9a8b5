"""Memory of the server's and the engine's process does not grow with requests over HTTP; a planted leak is found."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.http_load import Client, request_bytes, send_all
from tests.remote.serving import Serving, serving
from tests.server.scorecard import record

NUM_CONNECTIONS = 64
WARM_UP = 0.5  # of the samples: allocators fill their pools until about 100,000 requests
LEAK_BYTES = 64
SHORT = {"prompt": "def f(x):", "max_tokens": 4}
KINDS = (
    request_bytes(SHORT),
    request_bytes({**SHORT, "stream": True}),
    request_bytes({**SHORT, "stop": ["zz"], "seed": 1}),
    request_bytes({**SHORT, "n": 0}),
)
GIVEN_UP = request_bytes({"prompt": "x", "max_tokens": 3000, "stream": True})
GIVEN_UP_SHARE = 0.2


def held_bytes(pid: int) -> int:
    """What a process holds beside what it maps of files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return sum(int(found[name].split()[0]) for name in ("RssAnon", "VmSwap")) * 1024


def num_open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def batch(num_requests: int) -> Iterator[bytes]:
    """A quarter of them is refused."""
    return itertools.islice(itertools.cycle(KINDS), num_requests)


def give_up(port: int, num_requests: int) -> None:
    """Clients that leave in the middle of their stream."""
    for begin in range(0, num_requests, NUM_CONNECTIONS):
        clients = [Client(port) for _ in range(min(NUM_CONNECTIONS, num_requests - begin))]
        for client in clients:
            client.ask(GIVEN_UP)
        for client in clients:
            client.socket.recv(1)
            client.socket.close()


def samples(server: Serving, num_requests: int, num_samples: int) -> list[tuple[int, int, int]]:
    """Requests so far, bytes that the server and the engine hold."""
    found = []
    num_given_up = int(GIVEN_UP_SHARE * num_requests / num_samples)
    num_sent = num_requests // num_samples - num_given_up
    for i in range(1, num_samples + 1):
        answered = send_all(server.port, NUM_CONNECTIONS, batch(num_sent))
        assert set(answered.times_s) == {200, 400}
        assert len(answered.times_s[200]) == num_sent - num_sent // len(KINDS)
        give_up(server.port, num_given_up)
        held = [held_bytes(pid) for pid in (server.process.pid, server.engine_pid)]
        found.append((i * (num_sent + num_given_up), *held))
    return found


def bytes_a_request(found: list[tuple[int, int, int]], column: int) -> float:
    """The slope of a straight line through the samples after warm-up."""
    late = np.array(found[int(WARM_UP * len(found)) :], float)
    return float(np.polyfit(late[:, 0], late[:, column], 1)[0])


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_six_hundred_thousand_requests_over_http() -> None:
    """So many that one more arena of Python's allocator, 1 MiB, is few bytes a request."""
    num_requests = 600_000
    with serving({}) as server:
        send_all(server.port, NUM_CONNECTIONS, batch(1000))
        num_files = num_open_files(server.process.pid)
        found = samples(server, num_requests, 60)
        assert num_open_files(server.process.pid) <= num_files + NUM_CONNECTIONS
    slopes = bytes_a_request(found, 1), bytes_a_request(found, 2)
    with serving({}, num_leaked_bytes=LEAK_BYTES) as server:
        leaking = bytes_a_request(samples(server, num_requests // 4, 15), 1)
    record(
        "L1 over HTTP, the server's process",
        num_requests=num_requests,
        num_given_up=int(GIVEN_UP_SHARE * num_requests),
        bytes_a_request=round(slopes[0], 2),
        bytes_a_request_of_the_engine=round(slopes[1], 2),
        held_mib_at_samples=[round(held / 2**20, 2) for _, held, _ in found],
        planted_leak_bytes=LEAK_BYTES,
        bytes_a_request_with_leak=round(leaking, 2),
    )
    assert max(slopes) <= 16.0, slopes
    assert leaking > 16.0, leaking


def test_what_is_kept_of_a_few_requests_is_found() -> None:
    """Short: what is planted is as much larger as the run is shorter."""
    with serving({}, num_leaked_bytes=20_000) as server:
        assert bytes_a_request(samples(server, 2000, 8), 1) > 4000.0
    with serving({}) as server:
        assert bytes_a_request(samples(server, 2000, 8), 1) < 2000.0
