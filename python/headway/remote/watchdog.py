"""Ends an engine that lives and does not get on: its stacks are written down first.

Two watches. While the event loop runs, it compares the time since the last step with the limit. Where the loop itself
stands still, because a thread keeps the interpreter or a lock, a thread of C's notices, and needs neither.
"""

from __future__ import annotations

import faulthandler
import signal
import sys

from headway.errors import EngineDeadError


class Watchdog:
    """To be asked `has_expired` several times within its time; stacks go to stderr."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    @staticmethod
    def prepare() -> None:
        """SIGUSR1, and a fault in native code, write the stacks of all threads to stderr."""
        faulthandler.enable(sys.stderr)
        faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=True)

    def has_expired(self, seconds_since_progress: float) -> bool:
        """Also says that the event loop runs."""
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=sys.stderr)
        return seconds_since_progress > self._timeout_s

    def expire(self, seconds_since_progress: float) -> EngineDeadError:
        """Writes the stacks down and returns what is to be said."""
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        return EngineDeadError(
            f"no step for {seconds_since_progress:.1f} s while requests run; its stacks are in the log",
            hint="--watchdog-timeout-s",
        )

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()
