"""What timing another implementation needs: a time or the reason why there is none, and vLLM's ways."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

MAX_REASON_LEN = 90


def time_or_reason(measure: Callable[[], float]) -> float | str:
    """What measure returns, us; or what it raised: a peer that fails leaves a word in its cell, and the run goes on."""
    try:
        return measure()
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        return f"{type(error).__name__}: {first_line}"[:MAX_REASON_LEN]


def is_vllm_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


@cache
def _vllm_config() -> Any:
    from vllm.config import VllmConfig

    return VllmConfig()


@contextmanager
def vllm_configured() -> Iterator[None]:
    """vLLM's kernels look up a configuration."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(_vllm_config()):
        yield


def kernel_us(calls: list[Callable[[], object]], min_calls: int = 10) -> float:
    """Summed durations of a call's kernels by the profiler, mean over calls: neither launches nor gaps count.

    `calls` run in turn, as those of `timing.time_us` do.
    """
    for call in calls * 3:
        call()
    torch.cuda.synchronize()
    num_turns = -(-min_calls // len(calls))
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for call in calls * num_turns:
            call()
        torch.cuda.synchronize()
    total: float = sum(event.self_device_time_total for event in profile.key_averages())
    return total / (num_turns * len(calls))
