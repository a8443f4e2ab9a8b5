"""When requests are sent, and what their answers amount to. Knows no HTTP."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from headway.cli.bench.openai_stream import Answer

METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Times between requests are gamma distributed: burstiness 1 is a Poisson process, below it they come in clumps.

    Attributes:
        rate: requests a second; infinite: all at once.
        ramp: "linear" or "exponential" growth from the first of `ramp_rates` to the second, in place of `rate`.
    """

    rate: float = math.inf
    burstiness: float = 1.0
    ramp: str | None = None
    ramp_rates: tuple[float, float] = (0.0, 0.0)

    def offsets_s(self, num_requests: int, seed: int) -> list[float]:
        """When each request is sent, from the first on."""
        draws = random.Random(seed)
        now_s, offsets_s = 0.0, []
        for index in range(num_requests):
            offsets_s.append(now_s)
            rate = self._rate(index / max(1, num_requests - 1))
            if not math.isinf(rate):
                now_s += draws.gammavariate(self.burstiness, 1 / (rate * self.burstiness))
        return offsets_s

    def _rate(self, share: float) -> float:
        """At a share of all requests, 0 .. 1."""
        if self.ramp is None:
            return self.rate
        low, high = self.ramp_rates
        return low + (high - low) * share if self.ramp == "linear" else low * (high / low) ** share


async def send_all(
    asks: Sequence[Callable[[], Awaitable[Answer]]], offsets_s: Sequence[float], max_concurrency: int | None
) -> list[Answer]:
    """Each at its time, but at most max_concurrency at once; waiting for a place counts for nothing."""
    places = asyncio.Semaphore(max_concurrency or len(asks))
    begin_s = time.perf_counter()

    async def send(ask: Callable[[], Awaitable[Answer]]) -> Answer:
        async with places:
            return await ask()

    tasks = []
    for ask, offset_s in zip(asks, offsets_s, strict=True):
        await asyncio.sleep(max(0.0, begin_s + offset_s - time.perf_counter()))
        tasks.append(asyncio.ensure_future(send(ask)))
    return await asyncio.gather(*tasks)


def totals(answers: Sequence[Answer], duration_s: float) -> dict[str, Any]:
    """Counts and rates, under the names of vLLM's report."""
    good = [answer for answer in answers if answer.is_ok]
    num_input = sum(answer.num_input_tokens for answer in good)
    num_output = sum(answer.num_output_tokens for answer in good)
    return {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / duration_s,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        "max_output_tokens_per_s": _busiest_second(good),
        "max_concurrent_requests": _most_at_once(answers),
    }


def latencies_ms(
    answers: Sequence[Answer], metrics: Sequence[str], percents: Sequence[float]
) -> dict[str, float]:
    """mean, median, std and percentiles of each metric; 0 where there is nothing to measure."""
    import numpy as np

    report = {}
    for metric in metrics:
        values_ms = 1e3 * np.array(values_of(metric, [answer for answer in answers if answer.is_ok]) or [0.0])
        report[f"mean_{metric}_ms"] = float(values_ms.mean())
        report[f"median_{metric}_ms"] = float(np.median(values_ms))
        report[f"std_{metric}_ms"] = float(values_ms.std())
        for percent in percents:
            report[f"p{percent:g}_{metric}_ms"] = float(np.percentile(values_ms, percent))
    return report


def values_of(metric: str, answers: Sequence[Answer]) -> list[float]:
    """Seconds; one value a request, but one a gap for itl."""
    if metric == "itl":
        return [gap_s for answer in answers for gap_s in answer.gaps_s]
    attribute = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "latency_s"}[metric]
    found: list[float | None] = [getattr(answer, attribute) for answer in answers]
    return [value for value in found if value is not None]


def num_within(answers: Sequence[Answer], limits_ms: dict[str, float]) -> int:
    """Requests that kept every limit; one without a second token keeps any limit on time a token."""
    return sum(
        answer.is_ok and all(_worst_ms(name, answer) <= limit_ms for name, limit_ms in limits_ms.items())
        for answer in answers
    )


def _worst_ms(metric: str, answer: Answer) -> float:
    return 1e3 * max(values_of(metric, [answer]), default=0.0)


def _busiest_second(answers: Sequence[Answer]) -> float:
    """Output tokens in the second that had most of them; a request's tokens are spread over its events evenly."""
    origin_s = min((answer.begin_s for answer in answers), default=0.0)
    tokens: defaultdict[int, float] = defaultdict(float)
    for answer in answers:
        first_s = answer.begin_s - origin_s + (answer.ttft_s or 0.0)
        moments_s = list(accumulate(answer.gaps_s, initial=first_s))
        for moment_s in moments_s:
            tokens[int(moment_s)] += answer.num_output_tokens / len(moments_s)
    return max(tokens.values(), default=0.0)


def _most_at_once(answers: Sequence[Answer]) -> int:
    changes = [(answer.begin_s, 1) for answer in answers] + [(answer.end_s, -1) for answer in answers]
    num_open = most = 0
    for _, change in sorted(changes):
        num_open += change
        most = max(most, num_open)
    return most
