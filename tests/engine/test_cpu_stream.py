"""A CPU's stream is a thread: order, faults, its end, and an engine that is ahead of it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from headway.engine.cpu_stream import CpuStream
from headway.engine.staging import HostStaging, WorkerStaging
from headway.errors import EngineDeadError
from tests.engine.driving import prompt_of, run_dry, submit, tokens_of
from tests.engine.fake_model import expected_tokens, make_engine

PATIENCE_S = 30.0


def test_work_is_done_in_order_by_one_other_thread() -> None:
    stream, done = CpuStream(), []
    for number in range(100):
        stream.run(lambda n: done.append((n, threading.get_ident())), number)
    stream.synchronize()
    assert stream.is_idle()
    assert [number for number, _ in done] == list(range(100))
    assert len({thread for _, thread in done} | {threading.get_ident()}) == 2
    stream.close()


def test_the_caller_goes_on_while_work_is_done() -> None:
    stream, gate = CpuStream(), threading.Event()
    stream.run(gate.wait, PATIENCE_S)
    assert not stream.is_idle()
    stream.rest()
    assert not stream.is_idle()
    gate.set()
    stream.synchronize()
    stream.close()


def test_a_fault_is_raised_to_who_waits_and_nothing_follows_it() -> None:
    stream, done, gate = CpuStream(), [], threading.Event()
    stream.run(gate.wait, PATIENCE_S)
    stream.run(lambda: done.append(1 // 0))
    stream.run(done.append, 2)
    gate.set()
    with pytest.raises(ZeroDivisionError):
        stream.synchronize()
    with pytest.raises(ZeroDivisionError):
        stream.run(done.append, 3)
    assert done == []
    stream.close()
    stream.close()


def test_a_stream_that_is_dropped_ends_its_thread() -> None:
    stream, threads = CpuStream(), []
    stream.run(lambda: threads.append(threading.current_thread()))
    stream.synchronize()
    del stream
    gc.collect()
    threads[0].join(PATIENCE_S)
    assert not threads[0].is_alive()


def test_a_program_that_closes_nothing_ends() -> None:
    program = "from headway.engine.cpu_stream import CpuStream as S; s = S(); s.run(print, 'done'); s.run(print, 'too')"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout.split()) == (0, ["done", "too"]), ended.stderr


def test_only_launching_ahead_takes_a_thread() -> None:
    assert isinstance(make_engine(launch_depth=0).runner.staging, HostStaging)
    assert isinstance(make_engine(launch_depth=1).runner.staging, WorkerStaging)


@pytest.mark.parametrize("launch_depth", [1, 2, 4])
def test_the_engine_launches_ahead_of_a_step_that_runs(launch_depth: int) -> None:
    """The first step waits at a gate that only a later launch opens: nobody who ran steps in turn would come by."""
    gate = threading.Event()
    harness = make_engine(launch_depth=launch_depth, before_step=lambda: gate.wait(PATIENCE_S))
    engine = harness.engine
    request = submit(engine, prompt_of(5), ignore_eos=True)

    def launch(plan: object) -> None:
        harness.runner.launch(plan)
        if harness.ledger.num_in_flight == launch_depth + 1 and not gate.is_set():
            assert harness.model.step_sizes == []
            gate.set()

    engine.stages = replace(engine.stages, launch=launch)
    run_dry(engine)
    assert gate.is_set()
    assert tokens_of(request) == expected_tokens(prompt_of(5), 12, stops_at=None)
    engine.close()


@pytest.mark.parametrize("launch_depth", [1, 3])
def test_a_fault_in_the_worker_kills_the_engine_with_its_cause(launch_depth: int) -> None:
    engine = make_engine(fail_at=4, launch_depth=launch_depth).engine
    submit(engine, prompt_of(5), ignore_eos=True)
    with pytest.raises(EngineDeadError, match="caught fire"):
        run_dry(engine)
    with pytest.raises(EngineDeadError) as caught:
        engine.step()
    assert "caught fire" in str(caught.value.__cause__)
    engine.close()
