"""CUDA graphs of decode steps, one a row bucket: a step is then a single launch. Knows no plan and no model.

A graph records the very function that runs the step eagerly, so both give the same bits. What changes from step to
step the device reads from its own counter (`StepCounter` in csrc/core/step_layout.h).
"""

from __future__ import annotations

import contextlib
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

logger = logging.getLogger("headway")

# Runs, or under capture records, the decode step of so many rows, padding included.
Step = Callable[[int], None]


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows that decode steps are padded to: at most a seventh more than asked for from 49 rows on.

    1, 2, 4, then multiples of 8 up to 256, of 32 up to 1024, of 128 beyond, and max_rows itself.
    """
    ladder = [1, 2, 4, *range(8, 256, 8), *range(256, 1024, 32), *range(1024, max_rows, 128)]
    return (*ladder[: bisect_left(ladder, max_rows)], max_rows)


class DecodeGraphs:
    """Captured steps by number of rows. All share one memory pool, which nothing else uses.

    Args:
        buckets: numbers of rows, ascending.
        device: of the graphs.
    """

    def __init__(self, buckets: Sequence[int], device: torch.device) -> None:
        self._buckets = buckets
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # Records only. Not the stream that eager steps run on: workspaces taken under capture belong to it, and so
        # stay in the pool.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.failure: str | None = None  # why nothing more is captured

    @property
    def captured(self) -> tuple[int, ...]:
        return tuple(sorted(self._graphs))

    def prepare(self, run: Step, rehearse: Step, max_seconds: float) -> None:
        """Captures while there is time, the smallest steps first. The others are captured when first needed.

        `rehearse` runs a step's kernels on padding alone and leaves everything as it was.
        """
        begin_s = time.perf_counter()
        for num_rows in self._buckets:
            if self.failure is not None or time.perf_counter() - begin_s >= max_seconds:
                break
            if num_rows not in self._graphs:
                rehearse(num_rows)
                self._capture(run, num_rows)
        elapsed_s = time.perf_counter() - begin_s
        num_graphs = len(self._graphs)
        logger.info("captured %d of %d decode graphs in %.1f s", num_graphs, len(self._buckets), elapsed_s)

    def exec_of(self, num_rows: int) -> int:
        """The captured step's cudaGraphExec_t, to be launched without torch; 0 while there is none."""
        graph = self._graphs.get(num_rows)
        return 0 if graph is None else graph.raw_cuda_graph_exec()

    def launch(self, run: Step, num_rows: int) -> None:
        """Puts a step on the current stream. Its first time it runs eagerly, which warms up what capture needs."""
        graph = self._graphs.get(num_rows)
        if graph is not None:
            graph.replay()
            return
        run(num_rows)
        if self.failure is None:
            self._capture(run, num_rows)

    def close(self) -> None:
        """Frees the graphs. The device must be done with them, or dead."""
        for graph in self._graphs.values():
            with contextlib.suppress(RuntimeError):
                graph.reset()
        self._graphs.clear()

    def _capture(self, run: Step, num_rows: int) -> None:
        """Records the step. Where that fails, this and later steps stay eager, and the log says why."""
        graph = torch.cuda.CUDAGraph()
        fault = None
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run(num_rows)
            except Exception as error:
                fault = error
            try:
                graph.capture_end()
            except RuntimeError as error:
                fault = fault or error
        if fault is None:
            self._graphs[num_rows] = graph
        else:
            self._give_up(num_rows, fault)

    def _give_up(self, num_rows: int, fault: Exception) -> None:
        with contextlib.suppress(RuntimeError):  # where the broken capture left its memory pool open
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        self.failure = str(fault).strip().partition("\n")[0] or type(fault).__name__
        logger.warning(
            "decode steps that are not captured yet run eagerly: capturing one of %d rows failed: %s",
            num_rows,
            self.failure,
        )
