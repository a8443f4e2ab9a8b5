"""What a decode step costs the host, act by act, under several ways to wait for it; and whether logging slows it down.

The host's time of a step depends on what it waited for and how. To tell why, each act of the loop is timed by two
clocks, the wall's and the thread's own processor's, and right after each wait two probes are timed, too: arithmetic on
a few registers, which needs a fast core and no memory, and 2,048 reads all over a MiB, which slow down where the caches
were emptied (`cold`) and not when they are done again at once (`warm`).

Ways to wait: `nap` as the engine does, which rests for some 55 us and looks, again and again; `quiet` sleeps nearly as
long as the last waits were and looks then; `spin` looks all the time; `touch` naps and before each look runs over
what the acts will need; `evict` looks all the time, too, when it has emptied the caches on purpose. The second part
runs decode steps plain and with all that can watch them (bench/step_log.py), in turn; its times are of the device's own
clock.

usage: python -m bench.host_time small --out host_time.json [--rows 1 256] [--waits nap quiet] [--steps 150]
       python -m bench.host_time made-up --step-ms 0.4 2 20      (no GPU: an idle model, and waits that are made up)
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from bench.act_times import NUM_RAGGED, ActTimes, Probes
from bench.engine_step import PROMPT_LEN, make_engine
from bench.sides import HeadwaySide, SideOptions
from bench.step_log import StepLog
from bench.waits import WAITS
from headway import SamplingParams
from headway.engine.engine import Engine
from headway.engine.stages import Stages

if TYPE_CHECKING:
    from headway._core import Commit, Plan

MADE_UP = "made-up"

MADE_UP = "made-up"

Around = Callable[[Engine], Stages]  # the engine's stages and something around them


class Rig(Protocol):
    """An engine that runs num_rows requests of num_new tokens, for the while on the stages that `around` gives."""

    def run(self, num_rows: int, num_new: int, around: Around) -> None: ...


class GpuRig:
    def __init__(self, side: HeadwaySide) -> None:
        self._side = side
        self._draws = np.random.default_rng(1)

    def run(self, num_rows: int, num_new: int, around: Around) -> None:
        engine = self._side.llm._engine
        plain = engine.stages
        engine.stages = around(engine)
        prompts = self._draws.integers(10, self._side.vocab_size - 10, (num_rows, PROMPT_LEN)).tolist()
        self._side.generate(prompts, num_new)
        engine.stages = plain


class MadeUpRig:
    """A model that answers at once; its results are held back until step_s after the launch."""

    def __init__(self, step_s: float) -> None:
        self._step_ns = round(1e9 * step_s)
        self._end_ns = 0

    def run(self, num_rows: int, num_new: int, around: Around) -> None:
        engine = make_engine(num_rows, num_new)
        engine.stages = self._held_back(around(engine))
        params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True, detokenize=False)
        for _ in range(num_rows):
            engine.submit(engine.check("", 0, None, [3] * PROMPT_LEN, params))
        while engine.num_unfinished:
            engine.step()

    def _held_back(self, stages: Stages) -> Stages:
        def launch(plan: Plan) -> None:
            stages.launch(plan)
            self._end_ns = time.perf_counter_ns() + self._step_ns

        return replace(stages, launch=launch, collect=lambda _: stages.collect(self._is_ready))

    def _is_ready(self) -> bool:
        return time.perf_counter_ns() >= self._end_ns


def act_times(rig: Rig, num_rows: int, num_steps: int, wait: str) -> dict[str, Any]:
    """Runs twice: the probes would count as the host's time."""
    report: dict[str, Any] = {}
    for probes in (Probes(), None):
        times = ActTimes()
        around = partial(_timed, times=times, wait=wait, probes=probes)
        rig.run(num_rows, num_steps + 2 * NUM_RAGGED, around)
        report |= times.report()
    return report


def _timed(engine: Engine, *, times: ActTimes, wait: str, probes: Probes | None) -> Stages:
    return times.around(replace(engine.stages, collect=WAITS[wait](engine)), probes)


def logged_pair(rig: Rig, num_rows: int, num_steps: int, num_rounds: int) -> dict[str, list[float]]:
    """Step and gap of each round, plain and logged in turn: medians in us of the device's clock."""
    report: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for is_logged in (False, True) * num_rounds:
            log = StepLog(Path(folder) / "steps.log") if is_logged else None
            spans_ns: list[tuple[int, int]] = []
            rig.run(num_rows, num_steps + 2 * NUM_RAGGED, partial(_spanned, log=log, spans_ns=spans_ns))
            begins_us, ends_us = np.array(spans_ns)[NUM_RAGGED:-NUM_RAGGED].T / 1e3
            name = "plain" if log is None else "logged"
            report.setdefault(f"{name}_step_us", []).append(round(float(np.median(np.diff(ends_us))), 2))
            report.setdefault(f"{name}_gap_us", []).append(
                round(float(np.median(begins_us[1:] - ends_us[:-1])), 2)
            )
            if log is not None:
                log.close()
    return report


def _spanned(engine: Engine, *, log: StepLog | None, spans_ns: list[tuple[int, int]]) -> Stages:
    """Logged or not; the device's begin and end of each step are noted."""
    logged = engine.stages if log is None else log.around(engine.stages, engine.ledger)

    def commit() -> Commit | None:
        made = logged.commit()
        if made is not None:
            spans_ns.append((made.begin_ns, made.end_ns))
        return made

    return replace(logged, commit=commit)


def rigs(args: argparse.Namespace) -> Iterator[tuple[str, Rig]]:
    if args.model == MADE_UP:
        torch.set_num_threads(1)
        for step_ms in args.step_ms:
            yield f"{step_ms:g} ms", MadeUpRig(step_ms / 1e3)
        return
    side = HeadwaySide(SideOptions(args.model, max_model_len=1024))
    rig = GpuRig(side)
    rig.run(max(args.rows), 8, lambda engine: engine.stages)
    yield args.model, rig
    side.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=f"a file of bench/models, a checkpoint folder, or {MADE_UP}")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--waits", nargs="*", choices=WAITS, default=list(WAITS))
    parser.add_argument("--step-ms", type=float, nargs="+", default=[0.4, 2, 20])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--logged-rows", type=int, nargs="*", default=[8, 256])
    parser.add_argument("--rounds", type=int, default=5, help="of steps plain and logged")
    parser.add_argument("--commit", default="unknown", help="of the tree under test")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {
        "commit": args.commit,
        "model": args.model,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": processor_name(),
        "acts": [],
        "logged": [],
    }
    for name, rig in rigs(args):
        for num_rows in args.rows:
            for wait in args.waits:
                figures = act_times(rig, num_rows, args.steps, wait)
                report["acts"].append({"steps_of": name, "rows": num_rows, "wait": wait, **figures})
                print(json.dumps(report["acts"][-1]), flush=True)
        for num_rows in args.logged_rows if args.model != MADE_UP else ():
            figures = logged_pair(rig, num_rows, args.steps, args.rounds)
            report["logged"].append({"steps_of": name, "rows": num_rows, **figures})
            print(json.dumps(report["logged"][-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def processor_name() -> str:
    """Linux: /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


if __name__ == "__main__":
    main()
