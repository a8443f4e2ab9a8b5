"""Clocks around the acts of the loop, and two probes beside them. Knows no engine: bench/host_time.py runs one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from headway.engine.stages import Stages

ACTS = tuple(each.name for each in fields(Stages))
NUM_RAGGED = 16  # steps at each end of a run: prompts, first steps, the last
Clocks = tuple[int, int]  # the wall's and the thread's processor time, ns


def clocks_ns() -> Clocks:
    return time.perf_counter_ns(), time.thread_time_ns()


class Probes:
    """Arithmetic, and reads of scattered cache lines; the second time in a row these are at hand."""

    NUM_LINES, LINE_INT64S, NUM_BYTES = 2048, 8, 1 << 20

    def __init__(self) -> None:
        order = np.random.default_rng(0).permutation(self.NUM_BYTES // 64)
        self._lines = order[: self.NUM_LINES] * self.LINE_INT64S
        self._memory = np.arange(self.NUM_BYTES // 8)
        self._prime = (1 << 521) - 1

    def times_ns(self) -> tuple[int, int, int]:
        """Of the arithmetic, of the reads, of the same reads once more."""
        begin_ns = time.perf_counter_ns()
        pow(3, self._prime >> 400, self._prime)
        computed_ns = time.perf_counter_ns()
        self._memory.take(self._lines)
        read_ns = time.perf_counter_ns()
        self._memory.take(self._lines)
        return computed_ns - begin_ns, read_ns - computed_ns, time.perf_counter_ns() - read_ns


@dataclass
class ActTimes:
    """Of consecutive steps, ns. An act that came several times in a step counts with all of its times."""

    spent: dict[str, list[Clocks]] = field(default_factory=lambda: {act: [] for act in ACTS})
    ends: list[Clocks] = field(default_factory=list)
    probed: list[tuple[int, int, int]] = field(default_factory=list)
    _sums: dict[str, Clocks] = field(default_factory=dict)

    def around(self, stages: Stages, probes: Probes | None) -> Stages:
        """The same calls, timed, and after each wait the probes."""

        def timed(act: str) -> Callable[..., Any]:
            call = getattr(stages, act)

            def stage(*args: Any) -> Any:
                begin = clocks_ns()
                try:
                    return call(*args)
                finally:
                    self._add(act, begin, clocks_ns())
                    if act == "collect" and probes is not None:
                        self.probed.append(probes.times_ns())

            return stage

        return Stages(**{act: timed(act) for act in ACTS})

    def _add(self, act: str, begin: Clocks, end: Clocks) -> None:
        wall_ns, cpu_ns = self._sums.get(act, (0, 0))
        self._sums[act] = wall_ns + end[0] - begin[0], cpu_ns + end[1] - begin[1]
        if act == "outputs":
            for name in ACTS:
                self.spent[name].append(self._sums.get(name, (0, 0)))
            self._sums.clear()
            self.ends.append(end)

    def report(self) -> dict[str, Any]:
        """Medians in microseconds: of each act by both clocks, of a whole turn without the wait, and of the probes."""
        steady = slice(NUM_RAGGED, len(self.ends) - NUM_RAGGED)
        spent_us = {act: np.array(times)[steady] / 1e3 for act, times in self.spent.items()}
        turns_us = np.diff(np.array(self.ends)[steady], axis=0) / 1e3
        host_us = turns_us - spent_us["collect"][1:]
        report = {
            "host_us": medians(host_us),
            "host_us_p90": round(float(np.percentile(host_us[:, 0], 90)), 1),
            "step_us": medians(turns_us)[0],
            "cores_used": round(float(turns_us[:, 1].sum() / turns_us[:, 0].sum()), 3),
            **{f"{act}_us": medians(spent_us[act]) for act in ACTS},
        }
        if self.probed:
            names = ("arithmetic_us", "cold_reads_us", "warm_reads_us")
            report |= dict(zip(names, medians(np.array(self.probed)[steady] / 1e3), strict=True))
        return report


def medians(table: npt.NDArray[np.float64]) -> list[float]:
    """[n, columns] -> one number a column, to a tenth."""
    return [round(float(number), 1) for number in np.median(table, axis=0)]
