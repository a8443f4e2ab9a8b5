"""A worker thread that is a CPU's stream: what is queued runs in order while the engine goes on. Knows no step.

Kernels and products give up the GIL while they compute, so the host's own work runs beside them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import ParamSpec

P = ParamSpec("P")
REST_S = 1e-3  # the longest rest; the end of a piece of work ends it sooner

Work = Callable[[], None]


class _Progress:
    """What the worker tells the engine."""

    def __init__(self) -> None:
        self.num_done = 0
        self.news = threading.Event()  # a piece of work is over
        self.fault: BaseException | None = None


class CpuStream:
    """Queues work to one thread. As on a GPU, work after a fault is not done, and waiting raises the fault."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._progress = _Progress()
        self._num_queued = 0
        # The thread knows the queue, not this object, which may therefore be dropped without being closed. It is a
        # daemon, so that the finalizer, which runs at the interpreter's end too, comes before it is waited for.
        thread = threading.Thread(
            target=_work_off, args=(self._queue, self._progress), name="headway-cpu-stream", daemon=True
        )
        self._end = weakref.finalize(self, _end, self._queue, thread)
        thread.start()

    def run(self, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Queues a call. Raises an earlier call's fault instead."""
        self._raise_fault()
        self._num_queued += 1
        self._queue.put(lambda: work(*args, **kwargs))

    def rest(self) -> None:
        """Returns when some work is over, after REST_S at the latest."""
        self._progress.news.wait(REST_S)
        self._progress.news.clear()

    def is_idle(self) -> bool:
        """True when all that was queued is done. Raises the fault of what was not."""
        self._raise_fault()
        return self._progress.num_done == self._num_queued

    def num_done(self) -> int:
        """Pieces of work that are over, in order. Raises the fault of one that was not done."""
        self._raise_fault()
        return self._progress.num_done

    def synchronize(self) -> None:
        while not self.is_idle():
            self.rest()

    def close(self) -> None:
        """Lets the thread finish what is queued, and ends it. Legal twice."""
        self._end()

    def _raise_fault(self) -> None:
        if self._progress.fault is not None:
            raise self._progress.fault


def _work_off(queue: SimpleQueue[Work | None], progress: _Progress) -> None:
    while (work := queue.get()) is not None:
        if progress.fault is None:
            try:
                work()
                progress.num_done += 1
            except BaseException as fault:
                progress.fault = fault
        del work  # it holds the runner
        progress.news.set()


def _end(queue: SimpleQueue[Work | None], thread: threading.Thread) -> None:
    queue.put(None)
    if thread is not threading.current_thread():  # the worker itself may drop the last reference
        thread.join()
