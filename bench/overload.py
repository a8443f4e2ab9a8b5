"""How a server bears more than it can do: refusals at ten times its capacity, readers beside others that do not read.

    python -m bench.overload [--seconds 10]

The server and its engine, which says letters, have a process each; so have those who ask, and the slow readers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from bench.http_load import Answered, Client, for_seconds, request_bytes, send_all
from headway import __version__
from tests.remote.serving import Serving, serving

RESULTS = Path(__file__).parent / "results"
NUM_PLACES, NUM_QUEUED, NUM_CLIENTS = 16, 8, 160
NUM_READERS, NUM_SLOW = 8, 100
NUM_READER_TOKENS, NUM_SLOW_TOKENS = 400, 4000
STEP_S = 0.005
SLOW_READ_S = 0.05


def ask_for_seconds(port: int, num_clients: int, pause_s: float, seconds: float) -> Answered:
    request = request_bytes({"prompt": "def f(x):", "max_tokens": 32})
    return send_all(port, num_clients, for_seconds(request, seconds), pause_s)


def overload_report(seconds: float) -> dict[str, Any]:
    """At capacity; at ten times that, by clients that pause; and by as many that ask again at once.

    None of them waits as long as Retry-After tells them. A queue fills the places that fall free.
    """
    found: dict[str, Any] = {"num_clients": NUM_CLIENTS, "num_places": NUM_PLACES, "num_queued": NUM_QUEUED}
    engine = {"num_rows": NUM_PLACES, "max_waiting": NUM_QUEUED, "step_s": STEP_S}
    with serving(engine) as server, ProcessPoolExecutor(1) as pool:

        def answered(num_clients: int, pause_s: float, seconds: float) -> Answered:
            return pool.submit(ask_for_seconds, server.port, num_clients, pause_s, seconds).result()

        answered(NUM_PLACES, 0.0, 1.0)
        at_capacity = answered(NUM_PLACES, 0.0, seconds)
        assert set(at_capacity.times_s) == {200}
        capacity = at_capacity.num_replies / seconds
        found["at_capacity"] = times_report(at_capacity, seconds)
        found["at_ten_times"] = times_report(
            answered(NUM_CLIENTS, NUM_CLIENTS / (10 * capacity), seconds), seconds
        )
        found["without_pauses"] = times_report(answered(NUM_CLIENTS, 0.0, seconds), seconds)
    return found


def times_report(answered: Answered, seconds: float) -> dict[str, Any]:
    names = {200: "answers", 503: "refusals"}
    assert set(answered.times_s) <= set(names)
    return {
        names[status]: {"a_second": round(len(times) / seconds, 1), **spread(times)}
        for status, times in answered.times_s.items()
    }


def spread(times_s: list[float]) -> dict[str, float]:
    times_ms = sorted(1e3 * taken_s for taken_s in times_s)
    p99 = times_ms[int(0.99 * (len(times_ms) - 1))]
    found = {"median": statistics.median(times_ms), "p99": p99, "max": times_ms[-1]}
    return {f"{name}_ms": round(value, 1) for name, value in found.items()}


def neighbours_report() -> dict[str, Any]:
    """The same eight readers alone, beside a hundred that read, and beside a hundred that hardly do."""
    found: dict[str, Any] = {"num_readers": NUM_READERS, "num_others": NUM_SLOW}
    for name, kind in (("alone", None), ("beside_readers", False), ("beside_slow_readers", True)):
        with serving({"step_s": STEP_S}) as server, ProcessPoolExecutor(1) as pool:
            pool.submit(read_streams, server.port).result()
            if kind is None:
                tokens_a_second = pool.submit(read_streams, server.port).result()
            else:
                with crowd(server, is_slow=kind):
                    tokens_a_second = pool.submit(read_streams, server.port).result()
        found[f"tokens_a_second_{name}"] = tokens_a_second
    return found


def read_streams(port: int) -> int:
    """Tokens a second of all eight."""
    request = request_bytes({"prompt": "x", "max_tokens": NUM_READER_TOKENS, "stream": True})
    begin_s = time.perf_counter()
    assert set(send_all(port, NUM_READERS, [request] * NUM_READERS).times_s) == {200}
    return round(NUM_READERS * NUM_READER_TOKENS / (time.perf_counter() - begin_s))


@contextmanager
def crowd(server: Serving, *, is_slow: bool) -> Iterator[None]:
    """A hundred long streams in a process of their own, begun before the block and given up after it."""
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_hold_streams, args=(server.port, is_slow, theirs))
    process.start()
    pipe.recv()
    try:
        yield
        assert process.is_alive()
    finally:
        pipe.send(None)
        process.join()


def _hold_streams(port: int, is_slow: bool, pipe: Pipe) -> None:
    """Slow ones take a byte now and then, half of them nothing at all."""
    request = request_bytes({"prompt": "x", "max_tokens": NUM_SLOW_TOKENS, "stream": True})
    clients = [Client(port) for _ in range(NUM_SLOW)]
    for client in clients:
        client.ask(request)
        client.socket.recv(1)
        client.socket.setblocking(False)
    pipe.send(None)
    while not pipe.poll(SLOW_READ_S if is_slow else 0.002):
        for client in clients[:: 2 if is_slow else 1]:
            try:
                client.socket.recv(1 if is_slow else 1 << 18)
            except BlockingIOError:
                continue
    for client in clients:
        client.socket.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--output-json", default=str(RESULTS / "overload.json"))
    args = parser.parse_args()
    report = {
        "overload": overload_report(args.seconds),
        "neighbours": neighbours_report(),
        "load_average": os.getloadavg()[0],
        "num_cores": os.cpu_count(),
        "versions": {"headway": __version__},
    }
    Path(args.output_json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
