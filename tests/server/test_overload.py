"""Ten times what there is room for: who is refused is told when to come back, who is taken is answered whole, and
afterwards all is as before. Then a hundred streams at a stop, and readers that read slowly or not at all.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.live import Live, live, read_all, wait_until
from tests.server.scorecard import held_bytes, record
from tests.server.small_engine import SmallEngine, expected_tokens
from tests.server.test_lifecycle import posted, settings

MAX_ROWS, MAX_WAITING = 8, 8
NUM_CLIENTS = 10 * (MAX_ROWS + MAX_WAITING)
NUM_TOKENS = 8
MAX_RETRY_AFTER_S = 60
BUFFER_LIMIT_BYTES = 256 * 1024


@dataclass
class Tally:
    """What clients got, and the longest queue that a step has seen."""

    statuses: Counter[int] = field(default_factory=Counter)
    refusal_s: list[float] = field(default_factory=list)
    longest_queue: int = 0

    def check(self) -> None:
        assert set(self.statuses) == {200, 503}
        assert self.longest_queue <= MAX_WAITING, f"{self.longest_queue} wait"


async def post(server: Live, body: dict[str, Any]) -> bytes:
    """The reply, headers and all."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        writer.write(posted(body))
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


async def client(server: Live, index: int, num_requests: int, tally: Tally) -> None:
    """One after the other, whatever comes back."""
    prompt = [20 + index, 3, 4]
    body = {"prompt": prompt, "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    for _ in range(num_requests):
        begin_s = time.perf_counter()
        head, _, content = (await post(server, {**body, "return_token_ids": True})).partition(b"\r\n\r\n")
        status, reply = int(head.split(b" ")[1]), json.loads(content)
        tally.statuses[status] += 1
        if status == 200:
            (choice,) = reply["choices"]
            assert choice["finish_reason"] == "length"
            assert choice["token_ids"] == expected_tokens(prompt, NUM_TOKENS), "its answer is not whole"
        else:
            tally.refusal_s.append(time.perf_counter() - begin_s)
            check_refusal(head, reply)


def check_refusal(head: bytes, reply: dict[str, Any]) -> None:
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert 1 <= int(headers[b"retry-after"]) <= MAX_RETRY_AFTER_S
    assert reply["error"]["code"] == "overloaded"


def overload(engine: SmallEngine, num_requests: int, **limits: Any) -> Tally:
    """Clients enough for ten times the capacity, each with its share of the requests."""
    tally = Tally()

    def look() -> None:
        tally.longest_queue = max(tally.longest_queue, engine.ledger.stats().num_waiting)

    async def crowd(server: Live) -> None:
        share = -(-num_requests // NUM_CLIENTS)
        await asyncio.gather(*(client(server, i, share, tally) for i in range(NUM_CLIENTS)))

    engine.runner.on_step = look
    with live(engine, **limits) as server:
        asyncio.run(crowd(server))
        wait_until(lambda: not server.state.open_calls and engine.ledger.num_in_flight == 0)
        engine.check_empty()
        assert server.state.gate.num_requests == server.state.gate.num_queued_tokens == 0
        assert server.post("/v1/completions", {"prompt": [5], "max_tokens": 1}).status == 200
        assert server.get("/ready").status == 200
    return tally


@pytest.mark.parametrize("num_requests", [800, pytest.param(20_000, marks=pytest.mark.long)])
def test_ten_times_what_fits(num_requests: int) -> None:
    engine = SmallEngine(max_rows=MAX_ROWS, max_waiting=MAX_WAITING, step_s=0.001)
    tally = overload(engine, num_requests)
    tally.check()
    if num_requests == 20_000:
        refusals_ms = sorted(1e3 * value for value in tally.refusal_s)
        record(
            "H9 overload",
            num_clients=NUM_CLIENTS,
            num_answered=tally.statuses[200],
            num_refused=tally.statuses[503],
            longest_queue=tally.longest_queue,
            refusal_p99_ms=round(refusals_ms[len(refusals_ms) * 99 // 100], 1),
        )


def test_a_queue_without_end_would_be_seen() -> None:
    tally = overload(SmallEngine(max_rows=MAX_ROWS, step_s=0.001), 320)
    assert tally.longest_queue > MAX_WAITING
    with pytest.raises(AssertionError):
        tally.check()


def test_an_answer_that_is_cut_short_would_be_seen() -> None:
    class Short(SmallEngine):
        def stream(self, request):  # type: ignore[no-untyped-def]
            params = replace(request.params, max_tokens=NUM_TOKENS - 1)
            return super().stream(replace(request, params=params))

    with pytest.raises(AssertionError, match="not whole"):
        overload(Short(max_rows=MAX_ROWS, max_waiting=MAX_WAITING), NUM_CLIENTS)


def open_streams(
    server: Live, stack: ExitStack, num_streams: int, body: dict[str, Any]
) -> list[socket.socket]:
    socks = [stack.enter_context(server.connect(timeout_s=60)) for _ in range(num_streams)]
    for sock in socks:
        sock.sendall(posted({**body, "stream": True}))
    return socks


def drain(shutdown_timeout_s: float, num_streams: int) -> Counter[str]:
    """How the streams end that are open at SIGTERM."""
    engine = FakeEngine(step_s=0.01)
    server = Live(engine, settings(shutdown_timeout_s=shutdown_timeout_s))
    server.start()
    with ExitStack() as stack:
        socks = open_streams(server, stack, num_streams, {"prompt": "x", "max_tokens": 60})
        wait_until(lambda: len(engine.live) == num_streams)
        server.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: server.state.is_draining)
        assert server.get("/ready").status == 503
        assert server.post("/v1/completions", {"prompt": "x"}).status == 503
        ends = Counter(end_of(read_all(sock)) for sock in socks)
    server.join()
    assert server.server.exit_code == 0
    assert not engine.live
    assert engine.is_closed
    return ends


def end_of(reply: bytes) -> str:
    """A stream's last event before [DONE]: its finish reason, or its error's code."""
    *_, last, done, rest = reply.split(b"\n\n")
    if b"data: [DONE]" not in done or b"0\r\n\r\n" not in done + rest:
        return "cut off"
    event = json.loads(last[last.index(b"{") :])
    return str(event["error"]["code"] if "error" in event else event["choices"][0]["finish_reason"])


@pytest.mark.parametrize("num_rounds", [1, pytest.param(10, marks=pytest.mark.long)])
def test_open_streams_are_finished_at_a_stop(num_rounds: int) -> None:
    for _ in range(num_rounds):
        assert drain(30.0, 100) == {"stop": 100}
    if num_rounds == 10:
        record("H10 drain", num_rounds=num_rounds, num_streams=100, num_finished=100 * num_rounds)


def test_streams_that_a_stop_ends_would_be_seen() -> None:
    assert drain(0.05, 10) == {"shutting_down": 10}


@dataclass
class Buffers:
    """Bytes that the server holds for a connection, watched while others read slowly."""

    largest: int = 0
    num_served: int = 0
    grown_bytes: int = 0

    async def watch(self, server: Live) -> None:
        while True:
            for connection in list(server.server.server_state.connections):
                transport = getattr(connection, "transport", None)
                if transport is not None and not transport.is_closing():
                    self.largest = max(self.largest, transport.get_write_buffer_size())
            await asyncio.sleep(0.005)

    def check(self, num_readers: int) -> None:
        assert self.largest <= BUFFER_LIMIT_BYTES, f"{self.largest} bytes wait for one client"
        assert self.num_served == num_readers
        assert self.grown_bytes < 64 * 2**20


def read_slowly(num_slow: int, num_readers: int) -> Buffers:
    """Half of the slow ones read a byte now and then, the other half nothing; readers beside them read all."""
    found, piece = Buffers(), "z" * 20_000
    engine = FakeEngine(lambda request: [piece] * 600 if len(request.prompt_token_ids) > 1 else ["a"] * 200)
    send_timeout_s = 3.0 + 0.1 * num_slow  # all are there before one is cut off, also on a busy machine
    with live(engine, send_timeout_s=send_timeout_s) as server, ExitStack() as stack:
        begin_bytes = held_bytes()
        watcher = asyncio.run_coroutine_threadsafe(found.watch(server), server.loop)
        slow = [stack.enter_context(server.connect()) for _ in range(num_slow)]
        for sock in slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(posted({"prompt": [5, 6], "stream": True}))
        wait_until(lambda: len(engine.live) == num_slow)
        readers = open_streams(server, stack, num_readers, {"prompt": [5]})
        while server.state.open_calls:
            for sock in slow[: num_slow // 2]:
                sock.settimeout(0.001)
                with suppress(OSError):
                    sock.recv(1)
            time.sleep(0.2)
        found.num_served = sum(read_all(sock).count(b'"text":"a"') == 200 for sock in readers)
        found.grown_bytes = held_bytes() - begin_bytes
        watcher.cancel()
        assert engine.num_left_early == num_slow, "a client that takes nothing was kept"
        assert server.get("/health").status == 200
    return found


@pytest.mark.parametrize("num_slow", [12, pytest.param(100, marks=pytest.mark.long)])
def test_readers_that_do_not_read_cost_little_and_are_cut_off(num_slow: int) -> None:
    found = read_slowly(num_slow, 8)
    found.check(8)
    if num_slow == 100:
        record(
            "H8 slow readers",
            num_slow=num_slow,
            largest_buffer_bytes=found.largest,
            grown_bytes=found.grown_bytes,
            num_served=found.num_served,
        )


def test_a_server_that_writes_ahead_of_its_reader_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go_on(self: object) -> None:
        await asyncio.sleep(0.001)

    monkeypatch.setattr("uvicorn.protocols.http.flow_control.FlowControl.drain", go_on)
    engine = FakeEngine(lambda request: ["z" * 20_000] * 1500)
    found = Buffers(num_served=1)
    with live(engine) as server, server.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        watcher = asyncio.run_coroutine_threadsafe(found.watch(server), server.loop)
        sock.sendall(posted({"prompt": [5, 6], "stream": True}))
        wait_until(lambda: found.largest > BUFFER_LIMIT_BYTES)
        watcher.cancel()
    with pytest.raises(AssertionError, match="wait for one client"):
        found.check(1)
