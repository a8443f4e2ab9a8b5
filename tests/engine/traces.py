"""Random traces of requests, and what each request got: the same at every launch depth, or somebody is wrong."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from headway._core import Ledger
from headway.engine.completion import Request
from headway.engine.engine import Engine
from headway.errors import RequestError
from tests.engine.driving import submit

MAX_STEPS = 5000


@dataclass(frozen=True)
class Arrival:
    """One request of a trace. Steps count from the trace's first."""

    step: int
    prompt: tuple[int, ...]
    params: dict[str, object]
    priority: int
    abort_step: int | None
    rewinds: tuple[tuple[int, int], ...] = ()  # (step, tokens) to go back, where that is possible then
    pauses: tuple[tuple[int, int], ...] = ()  # (step, step of the end)


@dataclass(frozen=True)
class Outcome:
    """All that a caller sees of a request."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: list[tuple[float, int | None]]  # of the chosen tokens, with their ranks


def random_trace(
    seed: int,
    *,
    prompt_of: Callable[[int, int], Sequence[int]],
    max_prompt_len: int,
    max_tokens: int,
    stops: Sequence[str],
    num_requests: int = 10,
    has_rewinds: bool = False,
    has_pauses: bool = False,
) -> list[Arrival]:
    """Greedy and sampled requests, with and without stop strings, some aborted on their way, some set back."""
    draws = random.Random(seed)
    trace = []
    for index in range(num_requests):
        step = draws.randrange(25)
        params: dict[str, object] = {
            "temperature": draws.choice([0.0, 0.0, 0.8, 1.2]),
            "seed": draws.randrange(1000),
            "max_tokens": draws.randrange(1, max_tokens + 1),
            "ignore_eos": draws.random() < 0.5,
            "logprobs": draws.choice([None, 0, 3]),
            "presence_penalty": draws.choice([0.0, 0.5]),
            "stop": list(stops) if draws.random() < 0.4 else [],
        }
        abort_step = step + draws.randrange(1, 30) if draws.random() < 0.25 else None
        prompt = tuple(prompt_of(draws.randrange(1, max_prompt_len + 1), draws.randrange(50) + index))
        rewinds = random_rewinds(draws, step) if has_rewinds else ()
        pauses = random_pauses(draws, step) if has_pauses else ()
        trace.append(Arrival(step, prompt, params, draws.randrange(3), abort_step, rewinds, pauses))
    return trace


def without_rewinds(trace: Sequence[Arrival]) -> list[Arrival]:
    """What every rewind must lead back to."""
    return [replace(arrival, rewinds=()) for arrival in trace]


def random_rewinds(draws: random.Random, step: int) -> tuple[tuple[int, int], ...]:
    steps = [step + draws.randrange(1, 40) for _ in range(draws.randrange(4))]
    return tuple((at, draws.randrange(6)) for at in sorted(steps))


def random_pauses(draws: random.Random, step: int) -> tuple[tuple[int, int], ...]:
    """Of one request in two; they may overlap, and outlast it."""
    begins = [step + draws.randrange(25) for _ in range(draws.choice([0, 0, 1, 2]))]
    return tuple((begin, begin + draws.randrange(1, 12)) for begin in begins)


def pause_or_resume(ledger: Ledger, request: Request, arrival: Arrival, step: int) -> None:
    for begin, end in arrival.pauses:
        if begin == step:
            ledger.pause(request.completions[0].ledger_id)
        if end == step:
            ledger.resume(request.completions[0].ledger_id)


def rewind(engine: Engine, request: Request, num_tokens: int) -> bool:
    """Whether it was possible."""
    try:
        return engine.rewind(request.completions[0], num_tokens)
    except RequestError:
        return False


def play(engine: Engine, trace: Sequence[Arrival]) -> list[Outcome]:
    """Runs a trace to its end, checking the ledger after every step. The engine is idle again afterwards."""
    requests: dict[int, Request] = {}
    for step in itertools.count():
        assert step < MAX_STEPS, f"{engine.num_unfinished} completions are not over after {step} steps"
        for index, arrival in enumerate(trace):
            if arrival.step == step:
                requests[index] = submit(engine, arrival.prompt, priority=arrival.priority, **arrival.params)
            if arrival.abort_step == step:
                engine.abort(requests[index])
            for at, num_tokens in arrival.rewinds:
                if at == step:
                    rewind(engine, requests[index], num_tokens)
            if arrival.pauses and index in requests:
                pause_or_resume(engine.ledger, requests[index], arrival, step)
        if len(requests) == len(trace) and not engine.num_unfinished:
            break
        engine.step()
        engine.ledger.check_integrity()
    drain(engine)
    return [outcome_of(requests[index]) for index in range(len(trace))]


def drain(engine: Engine) -> None:
    """Collects what is still in flight; then every pool must be full."""
    while engine.ledger.num_in_flight or engine.ledger.stats().num_transfers:
        engine.step()
    engine.ledger.check_integrity()
    stats = engine.ledger.stats()
    cached = engine.ledger.prefix_stats()
    assert stats.blocks_free + cached.num_evictable_blocks == stats.blocks_total
    assert stats.slots_free + cached.num_snapshots == stats.slots_total


def outcome_of(request: Request) -> Outcome:
    output = request.output().outputs[0]
    chosen = [entry[token] for token, entry in zip(output.token_ids, output.logprobs or [], strict=False)]
    return Outcome(
        output.token_ids,
        output.text,
        output.finish_reason,
        output.stop_reason,
        [(entry.logprob, entry.rank) for entry in chosen],
    )


def check_same(serial: Sequence[Outcome], ahead: Sequence[Outcome], what: str = "") -> None:
    """Bit-equal; of a request that was aborted in one of the runs, what both have of it."""
    for index, (expected, actual) in enumerate(zip(serial, ahead, strict=True)):
        if "abort" in (expected.finish_reason, actual.finish_reason):
            num_common = min(len(expected.token_ids), len(actual.token_ids))
            assert actual.token_ids[:num_common] == expected.token_ids[:num_common], (what, index)
            assert actual.logprobs[:num_common] == expected.logprobs[:num_common], (what, index)
        else:
            assert actual == expected, (what, index)
