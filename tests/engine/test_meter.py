"""The meter's totals over a made-up engine whose every time is known."""

from __future__ import annotations

import itertools

import pytest

from headway.engine import meter as meter_module
from headway.engine.meter import NUM_RECENT_STEPS, StepMeter
from tests.engine.paced import GAP_NS, HOST_NS, LAUNCH_NS, REACH_NS, RUN_NS, SEE_NS, PacedEngine


class Course:
    """An engine whose stages keep their meter from run to run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launch_depth: int) -> None:
        self.engine, self.meter = PacedEngine(launch_depth), StepMeter()
        monkeypatch.setattr(meter_module, "perf_counter_ns", lambda: self.engine.now_ns)

    def totals_of(self, num_steps: int) -> dict[str, int]:
        """What the meter gained by steps in the midst of others."""
        names = ("busy_ns", "idle_ns", "lead_ns", "num_led", "num_output_tokens")
        self.engine.run(3, self.meter)
        before = {name: getattr(self.meter, name) for name in names}
        self.engine.run(num_steps, self.meter)
        return {name: getattr(self.meter, name) - before[name] for name in names}


def test_steps_launched_ahead_lead_by_what_the_device_still_had(monkeypatch: pytest.MonkeyPatch) -> None:
    lead_ns = (
        GAP_NS + RUN_NS - 3 * HOST_NS - LAUNCH_NS
    )  # launched that long before the results of the step before
    assert Course(monkeypatch, 1).totals_of(50) == {
        "busy_ns": 50 * RUN_NS,
        "idle_ns": 50 * GAP_NS,
        "lead_ns": 50 * lead_ns,
        "num_led": 50,
        "num_output_tokens": 400,
    }


def test_serial_steps_lead_nothing_and_leave_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    gap_ns = SEE_NS + 3 * HOST_NS + REACH_NS
    found = Course(monkeypatch, 0).totals_of(50)
    assert (found["lead_ns"], found["num_led"], found["idle_ns"]) == (0, 0, 50 * gap_ns)


def test_the_last_steps_are_kept_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    course = Course(monkeypatch, 1)
    assert course.meter.recent_steps() == []
    course.totals_of(NUM_RECENT_STEPS + 10)
    spans = course.meter.recent_steps()
    last = NUM_RECENT_STEPS + 12
    assert [span.step for span in spans] == list(range(last - NUM_RECENT_STEPS + 1, last + 1))
    assert {span.end_ns - span.begin_ns for span in spans} == {RUN_NS}
    assert {(span.num_rows, span.num_decode_rows, span.num_tokens) for span in spans} == {(8, 8, 8)}


def test_a_device_without_a_clock_is_timed_by_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PacedEngine, "on_device", lambda engine, host_ns: 0)
    course = Course(monkeypatch, 1)
    assert course.totals_of(20)["busy_ns"] == 0
    spans = course.meter.recent_steps()
    assert all(before.end_ns <= after.begin_ns for before, after in itertools.pairwise(spans))
    assert {span.end_ns - span.begin_ns for span in spans[5:]} == {RUN_NS + GAP_NS}
