"""Running totals of an engine's steps: tokens, the device's busy and idle time, when it last got on. O(1) a step."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from headway.engine.stages import Stages

if TYPE_CHECKING:
    from headway._core import Commit


class StepMeter:
    """Written by the thread that steps; any thread may read.

    Attributes:
        num_prompt_tokens: of the requests taken.
        num_output_tokens: committed.
        busy_ns, idle_ns: of the device, by its own clock; idle is what lies between two steps while there was work.
    """

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.busy_ns = 0
        self.idle_ns = 0
        self._last_end_ns = 0  # 0: nothing to measure a gap from
        self._moved_s: float | None = None  # None: at rest

    def around(self, stages: Stages) -> Stages:
        """The same calls; commits are counted."""

        def commit() -> Commit | None:
            made = stages.commit()
            if made is not None:
                self._count(made)
            return made

        return replace(stages, commit=commit)

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
