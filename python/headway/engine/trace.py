"""A recorder of steps: what the host did when, and what the device's own clock says of each step.

It reads two clocks and what commits carry anyway: nothing is asked of the device, nothing waits. An engine without
one pays nothing. What the numbers mean is in `headway.engine.timeline`.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING

import numpy as np

from headway.engine.stages import Stages
from headway.engine.timeline import NO_STEP, Records, Table, Timeline, join

if TYPE_CHECKING:
    from collections.abc import Callable

    from headway._core import Commit, Plan
    from headway.engine.completion import Completion


class StepTrace:
    """Grows by about 2 KiB a step until it is cleared; costs the host about 2 us a step."""

    def __init__(self) -> None:
        # Flat lists of integers: nothing the garbage collector looks at.
        self._plans: list[int] = []  # step, begin, end
        self._launches: list[int] = []  # step, begin, end, rows, decode rows, tokens
        self._commits: list[int] = []  # step, begin, end, begin and end of its collect, of it on the device
        self._outputs: list[int] = []  # step, begin, end

    def clear(self) -> None:
        """Forgets. Steps that were launched before and retire later are left out of the timeline."""
        for column in (self._plans, self._launches, self._commits, self._outputs):
            column.clear()

    def timeline(self) -> Timeline:
        """Of all steps that were launched and retired since the last clear()."""

        def table(numbers: list[int], num_columns: int) -> Table:
            return np.array(numbers, np.int64).reshape(-1, num_columns)

        return join(
            Records(
                plans=table(self._plans, 3),
                launches=table(self._launches, 6),
                commits=table(self._commits, 7),
                outputs=table(self._outputs, 3),
            )
        )

    def around(self, stages: Stages) -> Stages:
        """The same calls, timed. Keeps no hold on them itself: a trace may outlive its engine."""
        add_plan, add_launch = self._plans.extend, self._launches.extend
        add_commit, add_outputs = self._commits.extend, self._outputs.extend
        now_ns = perf_counter_ns
        collect_begin_ns = collect_end_ns = 0

        def plan() -> Plan | None:
            begin_ns = now_ns()
            made = stages.plan()
            add_plan((NO_STEP if made is None else made.step, begin_ns, now_ns()))
            return made

        def launch(plan: Plan) -> None:
            begin_ns = now_ns()
            stages.launch(plan)
            end_ns = now_ns()
            add_launch((plan.step, begin_ns, end_ns, plan.num_rows, plan.num_decode_rows, plan.num_tokens))

        def collect(is_ready: Callable[[], bool]) -> None:
            nonlocal collect_begin_ns, collect_end_ns
            collect_begin_ns = now_ns()
            stages.collect(is_ready)
            collect_end_ns = now_ns()

        def commit() -> Commit | None:
            begin_ns = now_ns()
            made = stages.commit()
            end_ns = now_ns()
            if made is not None:
                collected = (collect_begin_ns, collect_end_ns)
                add_commit((made.step, begin_ns, end_ns, *collected, made.begin_ns, made.end_ns))
            return made

        def outputs(commit: Commit, now_s: float) -> list[Completion]:
            begin_ns = now_ns()
            try:
                return stages.outputs(commit, now_s)
            finally:  # an error here ends no engine; commits and outputs stay in pairs
                add_outputs((commit.step, begin_ns, now_ns()))

        return Stages(plan, launch, collect, commit, outputs)
