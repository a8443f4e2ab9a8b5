"""What bench/host_time.py hangs on an engine sees every step, and changes none."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.act_times import ACTS, NUM_RAGGED, ActTimes, Probes
from bench.engine_step import make_engine
from bench.host_time import MadeUpRig, act_times
from bench.step_log import LINE_STEPS, StepLog
from headway import SamplingParams

NUM_ROWS, NUM_STEPS = 3, 2 * LINE_STEPS + 7


def test_a_step_log_sees_every_step_and_writes_a_line_a_hundred(tmp_path: Path) -> None:
    engine, log = make_engine(NUM_ROWS, NUM_STEPS), StepLog(tmp_path / "steps.log")
    engine.stages = log.around(engine.stages, engine.ledger)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_STEPS, ignore_eos=True, detokenize=False)
    requests = [engine.submit(engine.check("", 0, None, [3] * 8, params)) for _ in range(NUM_ROWS)]
    while engine.num_unfinished:
        engine.step()
    log.close()
    assert [request.num_output_tokens for request in requests] == [NUM_STEPS] * NUM_ROWS
    assert log.meter.num_output_tokens == NUM_ROWS * NUM_STEPS
    assert len(log.trace.timeline()) == NUM_STEPS
    lines = (tmp_path / "steps.log").read_text(encoding="utf-8").splitlines()
    assert len(lines) == NUM_STEPS // LINE_STEPS
    assert lines[0].startswith(f"{NUM_ROWS} running, 0 waiting, {NUM_ROWS * LINE_STEPS} output tokens")


@pytest.mark.parametrize("wait", ["nap", "quiet", "spin", "touch"])
def test_every_act_of_every_step_is_timed(wait: str) -> None:
    report = act_times(MadeUpRig(step_s=1e-4), NUM_ROWS, num_steps=4, wait=wait)
    assert all(len(report[f"{act}_us"]) == 2 for act in ACTS)
    assert report["collect_us"][0] >= 1.0
    assert report["step_us"] >= 100.0  # what was made up
    assert {"arithmetic_us", "cold_reads_us", "warm_reads_us"} <= report.keys()


def test_acts_and_probes_stay_in_step() -> None:
    times = ActTimes()
    num_new = 2 * NUM_RAGGED + 5
    MadeUpRig(step_s=0.0).run(NUM_ROWS, num_new, lambda engine: times.around(engine.stages, Probes()))
    assert len(times.ends) == len(times.probed) == num_new
    assert all(len(spent) == num_new for spent in times.spent.values())
