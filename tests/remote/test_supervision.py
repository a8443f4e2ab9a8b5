"""Who dies, stops or stands still is noticed, everybody who waits is told, and nothing is left over. Real processes."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.remote.serving import LONG, Serving, serving
from tests.server.live import wait_until
from tests.server.scorecard import record

NUM_ENDS = 25


def is_running(pid: int) -> bool:
    """A zombie does not run."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def waiting(server: Serving, num_each: int = 3) -> Iterator[list[str]]:
    """Clients that stream and clients that wait for the whole; the list has their bodies once the block is left."""
    streams = [server.post(LONG) for _ in range(num_each)]
    assert all(reply.read(6) == b"data: " for reply in streams)
    bodies: list[str] = []

    def ask() -> None:
        bodies.append(server.post({**LONG, "stream": False}).read().decode())

    threads = [threading.Thread(target=ask) for _ in range(num_each)]
    for thread in threads:
        thread.start()
    wait_until(lambda: num_open(server) == 2 * num_each)
    yield bodies
    bodies += [reply.read().decode() for reply in streams]
    for thread in threads:
        thread.join(30)
    assert len(bodies) == 2 * num_each


def num_open(server: Serving) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/load")
    found = json.loads(connection.getresponse().read())["server_load"]
    connection.close()
    return int(found)


def assert_all_told(bodies: list[str]) -> None:
    for body in bodies:
        if body.endswith("data: [DONE]\n\n"):
            events = [part.removeprefix("data: ") for part in body.split("\n\n")]
            assert json.loads(events[-3])["error"]["code"] == "engine_dead"
        else:
            assert json.loads(body)["error"]["code"] == "engine_dead"


KILLS: dict[str, Callable[[int], None]] = {
    "killed": lambda pid: os.kill(pid, signal.SIGKILL),
    "crashed": lambda pid: os.kill(pid, signal.SIGSEGV),
    "stopped": lambda pid: os.kill(pid, signal.SIGSTOP),
}


def told_after_s(how: str, wait_s: float = 0.0) -> float:
    """How long six clients waited for the news of an engine's end, which comes so long after all of them were there."""
    with serving({"step_s": 0.01}, heartbeat_timeout_s=1.0) as server:
        with waiting(server) as bodies:
            assert server.get_status("/health") == 200
            time.sleep(wait_s)
            begin_s = time.monotonic()
            KILLS[how](server.engine_pid)
        taken_s = time.monotonic() - begin_s
        assert_all_told(bodies)
        assert taken_s < 20  # no figure: nobody waits for ever
        assert server.end() == 1
        assert not is_running(server.engine_pid)
        expected = {"killed": "SIGKILL", "crashed": "SIGSEGV", "stopped": "no sign of life"}[how]
        assert expected in server.log
        assert ("Segmentation fault" in server.log) == (how == "crashed")
    return taken_s


@pytest.mark.parametrize("how", KILLS)
def test_an_engine_that_goes_is_told_to_everybody_and_ends_the_server(how: str) -> None:
    told_after_s(how)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", KILLS)
def test_engines_that_go_at_any_moment(how: str) -> None:
    """Between any two things that server and engine do."""
    draws = random.Random(how)
    taken_ms = sorted(1e3 * told_after_s(how, draws.uniform(0.0, 0.3)) for _ in range(NUM_ENDS))
    record(
        f"{'S2' if how == 'stopped' else 'S1'} engine {how}",
        num_engines=NUM_ENDS,
        num_told=6 * NUM_ENDS,
        told_after_ms_median=round(taken_ms[NUM_ENDS // 2]),
        told_after_ms_max=round(taken_ms[-1]),
    )


@pytest.mark.parametrize("how", ["idle", "hold", "fault"])
def test_an_engine_that_stands_still_is_told_to_everybody_and_ends_the_server(how: str) -> None:
    """Its loop runs on; its loop stands still too; it dies by itself."""
    options = {"step_s": 0.01, "max_steps": 60, "stall": how}
    with serving(options, watchdog_timeout_s=1.0, heartbeat_timeout_s=30.0) as server:
        with waiting(server, 2) as bodies:
            pass
        assert_all_told(bodies)
        assert server.end() == 1
        assert not is_running(server.engine_pid)
        expected = {"idle": "no step for", "hold": "exit code 1", "fault": "a fault"}[how]
        assert expected in server.log
        # Whose stacks were asked for, where they matter.
        assert ("_stand_still" in server.log) == (how == "hold")
        assert ("(most recent call first)" in server.log) == (how != "fault")


def test_an_engine_that_works_or_rests_is_left_alone() -> None:
    """The control of the tests above: longer than the limits, under load and without any."""
    with serving({"step_s": 0.02}, watchdog_timeout_s=1.5, heartbeat_timeout_s=3.0) as server:
        time.sleep(3.5)
        assert server.get_status("/health") == 200
        replies = [server.post({**LONG, "max_tokens": 200}) for _ in range(30)]
        assert all(reply.read().endswith(b"data: [DONE]\n\n") for reply in replies)
        assert server.get_status("/health") == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        assert "most recent call" not in server.log


def test_an_engine_that_is_stopped_is_not_ready_before_it_is_given_up() -> None:
    with serving({}, heartbeat_timeout_s=30.0) as server:
        os.kill(server.engine_pid, signal.SIGSTOP)
        wait_until(lambda: server.get_status("/ready") == 503)
        os.kill(server.engine_pid, signal.SIGCONT)
        wait_until(lambda: server.get_status("/ready") == 200)
        reply = server.post({**LONG, "max_tokens": 3})
        assert reply.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_an_engine_ends_with_its_server(state: str) -> None:
    with serving({"step_s": 0.01}) as server:
        reply = server.post(LONG)
        assert reply.read(6) == b"data: "
        assert is_running(server.engine_pid)
        if state == "stopped":
            os.kill(server.engine_pid, signal.SIGSTOP)
        server.process.kill()
        wait_until(lambda: not is_running(server.engine_pid))


def test_signals_to_the_engine_do_not_end_it() -> None:
    """A supervisor may send them to a whole group: they mean the server, which drains."""
    with serving({"step_s": 0.01}) as server:
        reply = server.post({**LONG, "max_tokens": 50})
        os.kill(server.engine_pid, signal.SIGTERM)
        os.kill(server.engine_pid, signal.SIGINT)
        assert reply.read().endswith(b"data: [DONE]\n\n")
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 0
        assert not is_running(server.engine_pid)


@pytest.mark.parametrize("num_streams", [25, pytest.param(100, marks=pytest.mark.long)])
def test_a_server_that_is_told_to_stop_answers_every_stream(num_streams: int) -> None:
    with serving({"step_s": 0.01}) as server:
        replies = [server.post({**LONG, "max_tokens": 150}) for _ in range(num_streams)]
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.get_status("/ready") == 503)
        assert server.post(LONG).status == 503
        for reply in replies:
            body = reply.read()
            assert body.endswith(b"data: [DONE]\n\n")
            assert body.count(b'"finish_reason":"length"') == 1
        assert server.end() == 0
        assert not is_running(server.engine_pid)


def test_what_outlasts_the_deadline_is_told_so() -> None:
    with serving({"step_s": 0.02}, shutdown_timeout_s=0.3) as server:
        reply = server.post(LONG)
        assert reply.read(6) == b"data: "
        server.process.send_signal(signal.SIGTERM)
        assert b'"code":"shutting_down"' in reply.read()
        assert server.end() == 0


def test_a_second_signal_ends_at_once() -> None:
    with serving({"step_s": 0.02}) as server:
        reply = server.post(LONG)
        assert reply.read(6) == b"data: "
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.get_status("/ready") == 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=30) is not None
        wait_until(lambda: not is_running(server.engine_pid))
