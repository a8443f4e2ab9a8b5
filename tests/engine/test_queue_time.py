"""When a request got its row: who waits for one waits in the queue, and who loses it keeps its first time."""

from __future__ import annotations

import itertools
import time

import pytest

from tests.engine.driving import prompt_of, run_dry, submit
from tests.engine.fake_model import make_engine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second later at every look."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("launch_depth", [0, 2])
def test_who_finds_no_row_waits_until_one_is_free(launch_depth: int) -> None:
    engine = make_engine(max_rows=2, launch_depth=launch_depth).engine
    requests = [submit(engine, prompt_of(5, i), max_tokens=6, ignore_eos=True) for i in range(3)]
    run_dry(engine)
    first, second, third = (request.metrics() for request in requests)
    assert first.admitted_s == second.admitted_s
    assert third.admitted_s is not None
    assert third.admitted_s > min(found.finished_s or 0 for found in (first, second))
    for found in (first, second, third):
        assert found.queue_s is not None
        assert found.prefill_s is not None
        assert found.decode_s is not None
        assert found.queue_s + found.prefill_s == found.ttft_s
        assert found.prefill_s + found.decode_s == found.inference_s
        assert found.queue_s + (found.inference_s or 0) == found.latency_s
        assert min(found.queue_s, found.prefill_s, found.decode_s) > 0


@pytest.mark.usefixtures("clock")
def test_an_evicted_request_keeps_the_time_of_its_first_row() -> None:
    harness = make_engine(num_blocks=18, max_rows=6)
    requests = [submit(harness.engine, prompt_of(13, i), max_tokens=40, ignore_eos=True) for i in range(6)]
    seen: dict[int, float] = {}
    while harness.engine.num_unfinished:
        harness.engine.step()
        for i, request in enumerate(requests):
            admitted_s = request.metrics().admitted_s
            if admitted_s is not None:
                assert seen.setdefault(i, admitted_s) == admitted_s
    assert harness.ledger.stats().num_evictions > 0
    assert len(seen) == 6


@pytest.mark.usefixtures("clock")
def test_of_several_completions_the_first_row_counts() -> None:
    engine = make_engine(max_rows=1).engine
    request = submit(engine, prompt_of(5), n=3, temperature=1.0, max_tokens=4, ignore_eos=True)
    run_dry(engine)
    times_s = [completion.admitted_s for completion in request.completions]
    assert times_s == sorted(times_s)
    assert request.metrics().admitted_s == times_s[0]


def test_a_request_that_never_ran_was_never_admitted() -> None:
    engine = make_engine().engine
    request = submit(engine, prompt_of(5))
    engine.abort(request)
    found = request.metrics()
    assert (found.admitted_s, found.queue_s, found.prefill_s, found.decode_s) == (None,) * 4
