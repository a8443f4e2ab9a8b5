"""Times device work by replaying a CUDA graph of calls between two events, and CPU work by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

REPLAYS = 9
MIN_GRAPH_US = 2000.0  # work in a graph, so that the events' own cost vanishes
MAX_CALLS = 400
MIN_CPU_SECONDS = 0.1


def time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call, in microseconds.

    `calls` do the same work on different memory; they run in turn, so that what one call leaves in the cache does not
    serve the next. Give one only where a hot cache is meant.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    once = _graph_us(calls, len(calls)) / len(calls)
    wanted = min(MAX_CALLS, max(len(calls), int(MIN_GRAPH_US / max(once, 0.1))))
    num_calls = -(-wanted // len(calls)) * len(calls)
    return _graph_us(calls, num_calls) / num_calls


def _graph_us(calls: Sequence[Callable[[], object]], num_calls: int) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            calls[i % len(calls)]()
    graph.replay()
    times: list[float] = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def copy_bytes_per_us(num_bytes: int = 2**30) -> float:
    """Device copy bandwidth, bytes read plus bytes written: the ceiling the byte floors are divided by.

    An elementwise kernel, not `copy_`: in a graph that becomes a memcpy node, which an H200 ran at 2.8 TB/s where its
    kernels move 4.3.
    """
    source = torch.randn(num_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * num_bytes / time_us([lambda: torch.neg(source, out=target)])


def time_cpu_us(run: Callable[[], object]) -> float:
    """Best time of one call: other processes only ever add to it."""
    for _ in range(3):
        run()
    best, end = float("inf"), time.perf_counter() + MIN_CPU_SECONDS
    while time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best * 1e6


def bytes_per_us() -> float:
    """Copy bandwidth of the device present."""
    return copy_bytes_per_us() if torch.cuda.is_available() else cpu_bytes_per_us()


def cpu_bytes_per_us(num_bytes: int = 2**26) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * num_bytes / time_cpu_us(lambda: target.copy_(source))
