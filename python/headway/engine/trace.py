"""A recorder of steps: what the host did when, and what the device's own clock says of each step.

It reads two clocks and what commits carry anyway: nothing is asked of the device, nothing waits. An engine without
one pays nothing. What the numbers mean is in `headway.engine.timeline`.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING

import numpy as np

from headway.engine.stages import Stages
from headway.engine.timeline import COLLECT, COMMIT, LAUNCH, OUTPUTS, PLAN, Spans, Timeline, join

if TYPE_CHECKING:
    from collections.abc import Callable

    from headway._core import Commit, Plan
    from headway.engine.completion import Completion

NO_STEP = -1  # a plan that found nothing to launch


class StepTrace:
    """Grows by about 2 KiB a step until it is cleared; costs the host about 2 us a step."""

    def __init__(self) -> None:
        self._spans: list[int] = []  # stage, step, begin, end
        self._launched: list[int] = []  # step, rows, decode rows, tokens
        self._retired: list[int] = []  # step, begin and end on the device

    def clear(self) -> None:
        """Forgets. Steps that were launched before and retire later are left out of the timeline."""
        for column in (self._spans, self._launched, self._retired):
            column.clear()

    def timeline(self) -> Timeline:
        """Of all steps that were launched and retired since the last clear()."""
        spans = Spans(*np.array(self._spans, np.int64).reshape(-1, 4).T)
        launched = np.array(self._launched, np.int64).reshape(-1, 4)
        retired = np.array(self._retired, np.int64).reshape(-1, 3)
        return join(spans, launched, retired)

    def around(self, stages: Stages) -> Stages:
        """The same calls, timed. Keeps no hold on them itself: a trace may outlive its engine."""
        spans, launched, retired = self._spans, self._launched, self._retired

        def plan() -> Plan | None:
            begin_ns = perf_counter_ns()
            made = stages.plan()
            end_ns = perf_counter_ns()
            spans.extend((PLAN, NO_STEP if made is None else made.step, begin_ns, end_ns))
            return made

        def launch(plan: Plan) -> None:
            begin_ns = perf_counter_ns()
            stages.launch(plan)
            spans.extend((LAUNCH, plan.step, begin_ns, perf_counter_ns()))
            launched.extend((plan.step, plan.num_rows, plan.num_decode_rows, plan.num_tokens))

        def collect(is_ready: Callable[[], bool]) -> None:
            begin_ns = perf_counter_ns()
            stages.collect(is_ready)
            spans.extend((COLLECT, NO_STEP, begin_ns, perf_counter_ns()))

        def commit() -> Commit | None:
            begin_ns = perf_counter_ns()
            made = stages.commit()
            end_ns = perf_counter_ns()
            if made is not None:
                spans[-3] = made.step  # of the collect, which did not know it yet
                spans.extend((COMMIT, made.step, begin_ns, end_ns))
                retired.extend((made.step, made.begin_ns, made.end_ns))
            return made

        def outputs(commit: Commit, now_s: float) -> list[Completion]:
            begin_ns = perf_counter_ns()
            changed = stages.outputs(commit, now_s)
            spans.extend((OUTPUTS, commit.step, begin_ns, perf_counter_ns()))
            return changed

        return Stages(plan, launch, collect, commit, outputs)
