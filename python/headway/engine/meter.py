"""Running totals of an engine's steps: tokens, the device's busy and idle time, how far ahead launches were, when it
last got on. O(1) a step; nothing is asked of the device.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from time import perf_counter_ns
from typing import TYPE_CHECKING

from headway.engine.stages import Stages
from headway.outputs import StepSpan

if TYPE_CHECKING:
    from headway._core import Commit, Plan

NUM_RECENT_STEPS = 256


@dataclass(frozen=True, slots=True)
class Launch:
    """A step on its way. The plan's numbers are copied: its packet's memory is used again."""

    begin_ns: int
    end_ns: int  # of the call that launched it, on the host's clock
    num_rows: int
    num_decode_rows: int
    num_tokens: int


class StepMeter:
    """Written by the thread that steps; any thread may read.

    Attributes:
        num_prompt_tokens: of the requests taken.
        num_output_tokens: committed.
        busy_ns, idle_ns: of the device, by its own clock; idle is what lies between two steps while there was work.
        lead_ns: summed over the num_led steps that were launched before the host had their predecessors' results:
            from the launch to those results, on the host's clock. The device had work waiting for so long.
    """

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.busy_ns = 0
        self.idle_ns = 0
        self.lead_ns = 0
        self.num_led = 0
        self._launched: deque[Launch] = deque()
        self._recent: list[StepSpan | None] = [None] * NUM_RECENT_STEPS  # at step modulo its length
        self._last_seen_ns = 0  # when the last results came, on the host's clock
        self._last_end_ns = 0  # 0: nothing to measure a gap from
        self._moved_s: float | None = None  # None: at rest

    def around(self, stages: Stages) -> Stages:
        """The same calls; launches and commits are counted."""

        def launch(plan: Plan) -> None:
            begin_ns = perf_counter_ns()
            stages.launch(plan)
            end_ns = perf_counter_ns()
            self._launched.append(
                Launch(begin_ns, end_ns, plan.num_rows, plan.num_decode_rows, plan.num_tokens)
            )

        def commit() -> Commit | None:
            seen_ns = perf_counter_ns()
            made = stages.commit()
            if made is not None:
                self._note(made, seen_ns)
                self._count(made)
            return made

        return replace(stages, launch=launch, commit=commit)

    def recent_steps(self) -> list[StepSpan]:
        """The last steps that retired, oldest first."""
        spans = [span for span in self._recent[:] if span is not None]
        return sorted(spans, key=lambda span: span.step)

    def rest(self) -> None:
        """There is nothing to do: time stops counting."""
        self._last_end_ns = 0
        self._moved_s = None

    def take(self, num_prompt_tokens: int) -> None:
        """A request has come: there is something to do."""
        self.num_prompt_tokens += num_prompt_tokens
        if self._moved_s is None:
            self._moved_s = time.perf_counter()

    @property
    def seconds_since_progress(self) -> float:
        """Since a step was committed or there was first something to do; 0 at rest."""
        moved_s = self._moved_s
        return 0.0 if moved_s is None else time.perf_counter() - moved_s

    def _count(self, commit: Commit) -> None:
        self.num_output_tokens += len(commit.tokens)
        self._moved_s = time.perf_counter()
        if not commit.end_ns:
            return
        self.busy_ns += commit.end_ns - commit.begin_ns
        if self._last_end_ns:
            self.idle_ns += max(0, commit.begin_ns - self._last_end_ns)
        self._last_end_ns = commit.end_ns

    def _note(self, commit: Commit, seen_ns: int) -> None:
        launch = self._launched.popleft()
        if self._launched:
            self.lead_ns += seen_ns - self._launched[0].end_ns
            self.num_led += 1
        begin_ns, end_ns = commit.begin_ns, commit.end_ns
        if not end_ns:
            begin_ns, end_ns = max(launch.begin_ns, self._last_seen_ns), seen_ns
        self._last_seen_ns = seen_ns
        self._recent[commit.step % NUM_RECENT_STEPS] = StepSpan(
            commit.step, begin_ns, end_ns, launch.num_rows, launch.num_decode_rows, launch.num_tokens
        )
