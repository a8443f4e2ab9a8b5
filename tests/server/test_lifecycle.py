"""Who leaves early, who reads slowly, too many at once, a stop, an engine that dies: nobody is left waiting."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from headway.server.calls import EndpointApp
from headway.server.completions import completions
from headway.server.schemas.completions import CompletionRequest
from headway.server.settings import ServerSettings
from headway.server.state import ServerState
from tests.server.fake_engine import FakeEngine
from tests.server.live import Answer, Live, live, wait_until

LONG = {"prompt": "x", "max_tokens": 2000}


def settings(**changes: Any) -> ServerSettings:
    return ServerSettings(port=0, **changes)


def engine_of(server: Live) -> FakeEngine:
    assert isinstance(server.client, FakeEngine)
    return server.client


def posted(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    return head.encode() + b"\r\nconnection: close\r\n\r\n" + data


def in_background(server: Live, body: dict[str, Any], found: list[Answer]) -> threading.Thread:
    thread = threading.Thread(target=lambda: found.append(server.post("/v1/completions", body)))
    thread.start()
    return thread


@pytest.fixture
def slow() -> Iterator[Live]:
    with live(FakeEngine(step_s=0.005)) as found:
        yield found


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("prompt", ["x", ["x", "y", "z"]])
def test_a_client_that_goes_ends_its_request(slow: Live, is_stream: bool, prompt: Any) -> None:
    engine = engine_of(slow)
    sock = slow.connect()
    sock.sendall(posted({**LONG, "prompt": prompt, "stream": is_stream}))
    num_prompts = len(prompt)
    wait_until(lambda: len(engine.live) == num_prompts)
    if is_stream:
        assert sock.recv(100)
    sock.close()
    wait_until(lambda: not engine.live and not slow.state.open_calls)
    assert engine.num_left_early == num_prompts
    assert slow.state.gate.num_requests == slow.state.gate.num_queued_tokens == 0


def test_a_client_that_goes_before_its_first_output_ends_its_request(slow: Live) -> None:
    engine = engine_of(slow)
    slow.on_loop(engine.may_go.clear)
    with slow.connect() as sock:
        sock.sendall(posted({**LONG, "stream": True}))
        wait_until(lambda: bool(engine.live))
    wait_until(lambda: not engine.live)


def test_a_client_that_takes_nothing_is_cut_off() -> None:
    big = FakeEngine(lambda request: ["z" * 20_000] * 200)
    with live(big, send_timeout_s=0.5) as server, server.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(posted({**LONG, "stream": True}))
        wait_until(lambda: bool(server.state.open_calls))
        assert server.get("/health").status == 200
        wait_until(lambda: not server.state.open_calls)
        assert big.num_left_early == 1


def test_a_slow_client_that_goes_on_reading_is_served() -> None:
    with (
        live(FakeEngine(lambda request: ["z" * 500] * 100), send_timeout_s=2.0) as server,
        server.connect() as sock,
    ):
        sock.sendall(posted({**LONG, "stream": True}))
        pieces = []
        while piece := sock.recv(3000):
            pieces.append(piece)
            time.sleep(0.001)
        assert b"data: [DONE]" in b"".join(pieces)


def test_an_engine_that_is_full_says_when_to_come_back() -> None:
    engine = FakeEngine(step_s=0.01, max_live=2)
    with live(engine) as server:
        found: list[Answer] = []
        threads = [in_background(server, {"prompt": "x", "max_tokens": 40}, found) for _ in range(12)]
        for thread in threads:
            thread.join()
        refused = [answer for answer in found if answer.status == 503]
        assert len(refused) >= 6
        assert sorted({answer.status for answer in found}) == [200, 503]
        assert all(answer.headers["retry-after"] == "3" for answer in refused)
        assert all(answer.error["code"] == "overloaded" for answer in refused)
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status == 200


def test_waiting_prompt_tokens_are_bounded() -> None:
    engine = FakeEngine()
    engine.may_go.clear()
    with live(engine, max_num_queued_tokens=50) as server:
        found: list[Answer] = []
        first = in_background(server, {"prompt": [5] * 60, "max_tokens": 3}, found)
        wait_until(lambda: bool(engine.live))
        answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
        assert (answer.status, answer.error["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        server.on_loop(engine.may_go.set)
        first.join()
        assert found[0].status == 200
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status == 200


def test_a_key_has_its_share() -> None:
    engine = FakeEngine()
    engine.may_go.clear()
    keys = {"authorization": "Bearer a"}, {"authorization": "Bearer b"}
    with live(engine, api_key=["a", "b"], max_num_reqs_per_key=1) as server:
        body = {"prompt": "x", "max_tokens": 2}
        done: list[Answer] = []
        ask = lambda: done.append(server.request("POST", "/v1/completions", body, keys[0]))  # noqa: E731
        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: bool(engine.live))
        answer = server.request("POST", "/v1/completions", body, keys[0])
        assert (answer.status, answer.error["type"]) == (429, "rate_limit_error")
        assert int(answer.headers["retry-after"]) >= 1
        server.on_loop(engine.may_go.set)
        thread.join()
        assert server.request("POST", "/v1/completions", body, keys[1]).status == 200
        assert server.request("POST", "/v1/completions", body, keys[0]).status == 200


def test_a_fault_in_the_middle_of_a_stream_is_told(slow: Live) -> None:
    engine_of(slow).num_steps_before_fault = 3
    events = slow.post("/v1/completions", {**LONG, "stream": True}).events
    assert [event["choices"][0]["text"] for event in events[:-1]] == ["a", "b", "c"]
    assert events[-1]["error"]["code"] == "engine_dead"
    assert all(choice["finish_reason"] is None for event in events[:-1] for choice in event["choices"])
    assert slow.post("/v1/completions", LONG).status == 503


def test_an_engine_that_dies_answers_everybody_and_ends_the_server() -> None:
    engine = FakeEngine(step_s=0.01)
    server = Live(engine, settings())
    server.start()
    found: list[Answer] = []
    threads = [in_background(server, {**LONG, "stream": i % 2 == 0}, found) for i in range(8)]
    wait_until(lambda: len(engine.live) == 8)
    engine.has_died = True
    for thread in threads:
        thread.join(timeout=10)
    assert len(found) == 8
    for answer in found:
        error = answer.events[-1]["error"] if answer.status == 200 else answer.error
        assert error["code"] == "engine_dead"
    server.join()
    assert server.server.exit_code == 1
    assert engine.is_closed


def test_a_server_that_is_told_to_stop_answers_what_is_open() -> None:
    engine = FakeEngine(step_s=0.01)
    server = Live(engine, settings())
    server.start()
    found: list[Answer] = []
    threads = [
        in_background(server, {"prompt": "x", "max_tokens": 100, "stream": True}, found) for _ in range(20)
    ]
    wait_until(lambda: len(engine.live) == 20)
    server.server.handle_exit(signal.SIGTERM, None)
    wait_until(lambda: server.state.is_draining)
    assert server.get("/ready").status == 503
    assert server.get("/health").status == 200
    refused = server.post("/v1/completions", LONG)
    assert (refused.status, refused.error["code"]) == (503, "shutting_down")
    assert int(refused.headers["retry-after"]) >= 1
    for thread in threads:
        thread.join()
    assert all(len(answer.events) == 100 for answer in found)
    server.join()
    assert server.server.exit_code == 0


def test_what_outlasts_the_deadline_ends_with_an_error() -> None:
    engine = FakeEngine(step_s=0.02)
    server = Live(engine, settings(shutdown_timeout_s=0.2))
    server.start()
    found: list[Answer] = []
    threads = [in_background(server, {**LONG, "stream": is_stream}, found) for is_stream in (True, False)]
    wait_until(lambda: len(engine.live) == 2)
    server.server.handle_exit(signal.SIGTERM, None)
    for thread in threads:
        thread.join(timeout=10)
    errors = [answer.events[-1]["error"] if answer.status == 200 else answer.error for answer in found]
    assert [error["code"] for error in errors] == ["shutting_down"] * 2
    server.join()


def test_a_second_signal_ends_at_once() -> None:
    engine = FakeEngine(step_s=0.02)
    server = Live(engine, settings())
    server.start()
    with server.connect() as sock:
        sock.sendall(posted(LONG))
        wait_until(lambda: bool(engine.live))
        server.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: server.state.is_draining)
        server.server.handle_exit(signal.SIGTERM, None)
        server.join()
    assert not engine.live


def test_health_is_progress() -> None:
    engine = FakeEngine()
    with live(engine, stall_timeout_s=5.0) as server:
        assert server.get("/health").json == {"status": "ok", "reason": "", "seconds_since_progress": 0.0}
        engine.stalled_s = 6.0
        answer = server.get("/health")
        assert (answer.status, answer.json["reason"]) == (503, "no step for 6 s")
        assert server.get("/ready").status == 503
        assert server.post("/ping", None).status == 503
        engine.stalled_s = 4.0
        assert server.get("/ready").status == 200


def test_prompts_of_a_request_end_together_where_one_is_refused() -> None:
    engine = FakeEngine(step_s=0.01, max_live=2)
    with live(engine) as server:
        assert server.post("/v1/completions", {**LONG, "prompt": ["a", "b", "c"]}).status == 503
        wait_until(lambda: not engine.live)


def test_the_load_is_told() -> None:
    engine = FakeEngine()
    engine.may_go.clear()
    with live(engine) as server:
        found: list[Answer] = []
        thread = in_background(server, {"prompt": [5] * 7, "max_tokens": 2}, found)
        wait_until(lambda: bool(engine.live))
        reply = server.get("/load").json
        assert (reply["server_load"], reply["num_queued_prompt_tokens"], reply["num_running"]) == (1, 7, 1)
        server.on_loop(engine.may_go.set)
        thread.join()
        assert server.get("/load").json["server_load"] == 0


def test_dev_endpoints_are_off_by_default(fake_server: Live) -> None:
    assert fake_server.post("/start_profile", None).status == 200
    assert fake_server.post("/start_profile", None).status == 400
    assert fake_server.post("/stop_profile", None).json == {"traceEvents": []}
    assert fake_server.post("/reset_prefix_cache", None).json == {"is_reset": True}
    with live(FakeEngine()) as server:
        for path in ("/start_profile", "/stop_profile", "/reset_prefix_cache"):
            assert server.post(path, None).status == 404


def test_a_long_prompt_does_not_hold_the_loop_up(model_server: Live) -> None:
    """It is tokenised on a thread: the loop goes round meanwhile."""
    ticks = []

    async def tick() -> None:
        while True:
            ticks.append(None)
            await asyncio.sleep(0)

    task = asyncio.run_coroutine_threadsafe(tick(), model_server.loop)
    num_before = len(ticks)
    answer = model_server.post("/tokenize", {"prompt": "x = 1\n" * 20_000})
    task.cancel()
    assert answer.status == 200
    assert len(ticks) - num_before > 10


class LostConnection:
    """Its client left while its request was on the way from the socket to the application."""

    on_gone: Callable[[], None] | None = None
    is_lost = True

    def cut(self) -> None: ...


def test_a_client_that_left_before_its_request_began_is_noticed() -> None:
    state, body = ServerState(FakeEngine(step_s=0.01), settings()), posted(LONG).split(b"\r\n\r\n")[1]
    scope = {
        "headway.headers": {b"content-type": b"application/json"},
        "headway.connection": LostConnection(),
        "headway.request_id": "left",
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: object) -> None:
        raise AssertionError(f"nobody reads {message}")

    app = EndpointApp(state, completions, CompletionRequest, is_generation=True)
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 5))
    assert not state.open_calls
    assert state.gate.num_requests == 0
    state.close()
