"""What a trace says of steps whose times are known, and that recording one changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from headway.engine.stages import with_nvtx_ranges
from headway.engine.timeline import STAGES, Spans, align
from headway.engine.trace import StepTrace
from headway.llm import LLM
from headway.request import SamplingParams
from tests.engine import paced
from tests.engine.driving import prompt_of, run_dry, submit, tokens_of
from tests.engine.fake_model import make_engine
from tests.engine.paced import paced_timeline

LOOP_US = (3 * paced.HOST_NS + paced.LAUNCH_NS) / 1e3


def test_serial_steps_leave_the_device_idle_while_the_host_works(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = paced_timeline(monkeypatch, 0, 100).figures()
    # After a step: seen, commit, outputs, plan, and the way to the device.
    gap_us = (paced.SEE_NS + 3 * paced.HOST_NS + paced.REACH_NS) / 1e3
    busy_us = paced.RUN_NS / 1e3
    assert figures.num_steps == 100
    assert figures.busy_us_median == busy_us
    assert figures.gap_us_median == figures.gap_us_max == gap_us
    assert figures.idle_share == pytest.approx(99 * gap_us / (99 * gap_us + 100 * busy_us), abs=1e-5)
    assert figures.host_us_median == LOOP_US
    assert figures.launch_lead_us_median == -LOOP_US  # counted from when the step's end was seen
    assert figures.queue_depth_mean == pytest.approx((3 + 200 + 1.5) / (200 + gap_us), abs=0.02)
    assert figures.clock_error_us == (paced.SEE_NS + paced.REACH_NS) / 1e3


def test_steps_launched_ahead_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = paced_timeline(monkeypatch, 1, 100).steady().figures()
    assert figures.gap_us_median == figures.gap_us_max == paced.GAP_NS / 1e3
    assert figures.idle_share == pytest.approx(1 / 201, abs=1e-4)
    assert figures.host_us_median == LOOP_US
    # Launched once its predecessor's predecessor was seen, committed and output; clocks are off by SEE_NS.
    after_us = (paced.SEE_NS + 3 * paced.HOST_NS + paced.LAUNCH_NS) / 1e3
    lead_us = (paced.GAP_NS + paced.RUN_NS) / 1e3 - after_us
    assert figures.launch_lead_us_median == pytest.approx(lead_us + paced.SEE_NS / 1e3)
    assert figures.queue_depth_mean == pytest.approx(1.85, abs=0.05)


@pytest.mark.parametrize("drift", [0.0, 5e-5, -5e-5])
@pytest.mark.parametrize("launch_depth", [0, 2])
def test_device_times_are_late_by_what_seeing_takes(
    monkeypatch: pytest.MonkeyPatch, launch_depth: int, drift: float
) -> None:
    """The results of every step are seen SEE_NS after its end, so that is how late its end is drawn."""
    timeline = paced_timeline(monkeypatch, launch_depth, 500, drift)
    assert timeline.clock is not None
    late_ns = timeline.clock.to_host(timeline.steps.end_ns) - (timeline.steps.seen_ns - paced.SEE_NS)
    drift_ns = abs(drift) * 64 * (paced.RUN_NS + 100_000)  # over one block of steps
    assert abs(late_ns - paced.SEE_NS).max() <= 1 + drift_ns


def test_a_host_that_looks_late_does_not_move_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of a block seen at once is enough."""
    steps = paced_timeline(monkeypatch, 0, 64).steps
    late_ns = np.where(np.arange(64) == 40, 0, 300_000)
    clock = align(replace(steps, seen_ns=steps.seen_ns + late_ns))
    assert clock is not None
    assert (clock.to_host(steps.end_ns) == steps.seen_ns).all()


@pytest.mark.parametrize("launch_depth", [0, 1, 3])
def test_spans_of_a_lane_do_not_overlap(monkeypatch: pytest.MonkeyPatch, launch_depth: int) -> None:
    timeline = paced_timeline(monkeypatch, launch_depth, 200, drift=3e-5)
    assert timeline.clock is not None
    begins_ns = timeline.clock.to_host(timeline.steps.begin_ns)
    ends_ns = timeline.clock.to_host(timeline.steps.end_ns)
    for begin, end in ((timeline.spans.begin_ns, timeline.spans.end_ns), (begins_ns, ends_ns)):
        assert (begin <= end).all()
        assert (end[:-1] <= begin[1:]).all()
    assert (timeline.steps.launch_begin_ns <= begins_ns).all()
    assert (ends_ns <= timeline.steps.seen_ns + 10).all()


def test_a_device_without_a_clock_has_host_figures_alone() -> None:
    harness, trace = make_engine(), StepTrace()
    harness.engine.stages = trace.around(harness.engine.stages)
    submit(harness.engine, prompt_of(9), ignore_eos=True)
    run_dry(harness.engine)
    timeline = trace.timeline()
    assert timeline.clock is None
    assert timeline.figures().asdict().keys() == {"num_steps", "host_us_median"}


@pytest.mark.parametrize("launch_depth", [0, 2])
def test_every_step_has_every_stage_in_order(launch_depth: int) -> None:
    harness, trace = make_engine(launch_depth=launch_depth, max_step_tokens=8), StepTrace()
    harness.engine.stages = trace.around(harness.engine.stages)
    requests = [submit(harness.engine, prompt_of(20, i), ignore_eos=True) for i in range(3)]
    num_steps = run_dry(harness.engine)
    timeline = trace.timeline()
    assert len(timeline) == num_steps
    assert timeline.steps.num_tokens.max() == 8
    for step in timeline.steps.step:
        assert stages_of(timeline.spans, step) == list(STAGES)
    assert all(len(tokens_of(request)) == 12 for request in requests)


def stages_of(spans: Spans, step: int) -> list[str]:
    return [STAGES[stage] for stage in spans.stage[spans.step == step]]


def test_a_cleared_trace_leaves_out_what_was_launched_before() -> None:
    harness, trace = make_engine(launch_depth=2), StepTrace()
    harness.engine.stages = trace.around(harness.engine.stages)
    submit(harness.engine, prompt_of(5), ignore_eos=True)
    for _ in range(4):
        harness.engine.step()
    first_step = 4 + harness.ledger.num_in_flight
    trace.clear()
    run_dry(harness.engine)
    steps = trace.timeline().steps.step
    assert len(steps) > 2
    assert steps.tolist() == list(range(steps[0], steps[0] + len(steps)))
    assert steps[0] >= first_step


def test_steady_steps_are_the_longest_run_of_equal_decode_steps() -> None:
    harness, trace = make_engine(max_step_tokens=8), StepTrace()
    harness.engine.stages = trace.around(harness.engine.stages)
    submit(harness.engine, prompt_of(30, 1), max_tokens=10, ignore_eos=True)
    submit(harness.engine, prompt_of(30, 2), max_tokens=30, ignore_eos=True)
    run_dry(harness.engine)
    timeline = trace.timeline()
    steps = timeline.steady().steps
    assert set(steps.num_rows) == set(steps.num_tokens) == {1}
    assert 10 <= len(steps.step) < len(timeline)


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> Iterator[LLM]:
    with LLM(tiny_model_dir, device="cpu", max_model_len=128, max_num_seqs=4) as llm:
        yield llm


def test_a_recorded_run_gives_the_same_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=20, logprobs=2)
    prompts = [prompt_of(length) for length in (5, 30, 61)]
    plain = [output.outputs[0] for output in llm.generate(prompts, params)]
    trace = llm.trace_steps()
    assert [output.outputs[0] for output in llm.generate(prompts, params)] == plain
    assert len(trace.timeline()) >= 20


def test_nvtx_ranges_are_named_after_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    open_ranges: list[str] = []
    seen: list[str] = []

    def push(name: str) -> None:
        assert not open_ranges
        open_ranges.append(name)
        seen.append(name)

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", open_ranges.pop)
    engine = make_engine().engine
    engine.stages = with_nvtx_ranges(engine.stages)
    request = submit(engine, prompt_of(5), max_tokens=1)
    engine.step()
    assert len(tokens_of(request)) == 1
    assert seen == ["plan", "launch", "plan", "collect", "commit", "outputs"]
    assert not open_ranges


def test_nvtx_is_nothing_on_a_cpu(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: pytest.fail("a range on a CPU"))
    with LLM(tiny_model_dir, device="cpu", max_model_len=64, max_num_seqs=2, nvtx=True) as llm:
        llm.generate([prompt_of(5)], SamplingParams(max_tokens=2))
