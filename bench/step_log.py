"""All that can watch an engine's steps, hung on at once: the meter that /metrics reads, the recorder of timelines, and
a line in a log file at every 100th step. Knows no benchmark; bench/host_time.py times steps with it and without.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from headway.engine.meter import StepMeter
from headway.engine.trace import StepTrace

if TYPE_CHECKING:
    from headway._core import Commit, Ledger
    from headway.engine.stages import Stages

LINE_STEPS = 100  # more often than anybody reads: a second of the fastest model has some 2,500 steps


class StepLog:
    """Close it when the steps are over.

    Args:
        log_path: the lines go here, appended.
    """

    def __init__(self, log_path: Path) -> None:
        self.meter = StepMeter()
        self.trace = StepTrace()
        self._file = logging.FileHandler(log_path)
        self._logger = logging.Logger("bench")  # of its own: settings of other loggers have no say
        self._logger.addHandler(self._file)
        self._num_steps = 0

    def around(self, stages: Stages, ledger: Ledger) -> Stages:
        """The same calls, logged."""
        logged = self.trace.around(self.meter.around(stages))

        def commit() -> Commit | None:
            made = logged.commit()
            self._num_steps += 1
            if self._num_steps % LINE_STEPS == 0:
                self._log(ledger)
            return made

        return replace(logged, commit=commit)

    def close(self) -> None:
        self._file.close()

    def _log(self, ledger: Ledger) -> None:
        stats, meter = ledger.stats(), self.meter
        elapsed_ns = max(1, meter.busy_ns + meter.idle_ns)
        self._logger.info(
            "%d running, %d waiting, %d output tokens, device idle %.2f %%, %d steps seen",
            stats.num_running,
            stats.num_waiting,
            meter.num_output_tokens,
            100 * meter.idle_ns / elapsed_ns,
            len(meter.recent_steps()),
        )
