"""What the server itself sees of requests: how they ended and how long they took. Counters and buckets.

Everything runs on the server's event loop, so nothing is locked; an output costs one look-up and one bisection.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from headway.outputs import RequestMetrics
from headway.request import SamplingParams
from headway.server.client import EngineOutput, EngineRequest

_GONE = (GeneratorExit, asyncio.CancelledError)
DECADE = (1.0, 2.0, 5.0)


def decades(low: int, high: int) -> tuple[float, ...]:
    """1, 2 and 5 times the powers of ten from 10**low up to 10**high, that last one included."""
    steps = [float(f"{step:g}e{power}") for power in range(low, high) for step in DECADE]
    return (*steps, float(f"1e{high}"))


class Buckets:
    """A histogram: `counts[i]` values were at most `bounds[i]` and above the bound before; the last has no bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, value: float, count: int = 1) -> None:
        """Counts `value`, `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count


class RequestMeter:
    """Of every generation since the start. A request is one prompt with its n completions.

    Attributes:
        ends: completions by how they ended: "stop", "length", "abort", "error", or "refused" before they began.
        replies: HTTP replies by status.
        token_gap_s: between the outputs of a completion that is streamed, divided among the tokens that came.
    """

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0, "error": 0, "refused": 0})
        self.replies: Counter[int] = Counter()
        self.queue_s = Buckets(decades(-4, 3))
        self.prefill_s = Buckets(decades(-3, 3))
        self.decode_s = Buckets(decades(-3, 4))
        self.inference_s = Buckets(decades(-3, 4))
        self.ttft_s = Buckets(decades(-3, 3))
        self.tpot_s = Buckets(decades(-4, 1))
        self.token_gap_s = Buckets(decades(-4, 1))
        self.latency_s = Buckets(decades(-3, 4))
        self.num_prompt_tokens = Buckets(decades(0, 6))
        self.num_output_tokens = Buckets(decades(0, 6))
        self.num_completions = Buckets(decades(0, 3))
        self.max_tokens = Buckets(decades(0, 6))

    def watch(self, requests: Sequence[EngineRequest]) -> Watch:
        """To be entered before the requests are sent, told of every output, and left when they are over."""
        return Watch(self, requests)

    def count_request(self, params: SamplingParams, metrics: RequestMetrics) -> None:
        """One whose completions all ended by themselves."""
        self.num_completions.add(params.n)
        if params.max_tokens is not None:
            self.max_tokens.add(params.max_tokens)
        self.num_prompt_tokens.add(metrics.num_prompt_tokens)
        self.num_output_tokens.add(metrics.num_output_tokens)
        for buckets, value in (
            (self.queue_s, metrics.queue_s),
            (self.prefill_s, metrics.prefill_s),
            (self.decode_s, metrics.decode_s),
            (self.inference_s, metrics.inference_s),
            (self.ttft_s, metrics.ttft_s),
            (self.tpot_s, metrics.tpot_s),
            (self.latency_s, metrics.latency_s),
        ):
            if value is not None:
                buckets.add(value)


class Watch:
    """The prompts of one HTTP request."""

    def __init__(self, meter: RequestMeter, requests: Sequence[EngineRequest]) -> None:
        self._meter = meter
        self._requests = requests
        self._num_open = [request.params.n for request in requests]  # completions, by prompt
        self._seen_s: dict[tuple[int, int], float] = {}  # prompt, completion -> when its last output came

    def note(self, prompt_index: int, output: EngineOutput) -> None:
        now_s = time.perf_counter()
        key = (prompt_index, output.index)
        before_s, num_tokens = self._seen_s.get(key), len(output.token_ids)
        self._seen_s[key] = now_s
        if before_s is not None and num_tokens:
            self._meter.token_gap_s.add((now_s - before_s) / num_tokens, num_tokens)
        if output.finish_reason is not None:
            self._end(prompt_index, output.finish_reason, output.metrics)

    def _end(self, prompt_index: int, reason: str, metrics: RequestMetrics | None) -> None:
        self._meter.ends[reason] += 1
        self._num_open[prompt_index] -= 1
        if not self._num_open[prompt_index] and metrics is not None and reason in ("stop", "length"):
            self._meter.count_request(self._requests[prompt_index].params, metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What did not end by itself was given up by its client, or failed, or was never begun."""
        is_gone = kind is not None and issubclass(kind, _GONE)
        reason = "abort" if is_gone else "error" if self._seen_s else "refused"
        self._meter.ends[reason] += sum(self._num_open)
