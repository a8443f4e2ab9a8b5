"""Short ways to put requests into an engine and run it dry."""

from __future__ import annotations

from collections.abc import Sequence

from headway.engine.completion import Request
from headway.engine.engine import Engine
from headway.request import SamplingParams


def submit(engine: Engine, prompt: Sequence[int], *, priority: int = 0, **params: object) -> Request:
    defaults = {"temperature": 0.0, "max_tokens": 12}
    checked = engine.check("0", 0, None, prompt, SamplingParams(**{**defaults, **params}), priority)
    return engine.submit(checked)


def run_dry(engine: Engine, max_steps: int = 10_000) -> int:
    """Steps until nothing is left, checking the ledger's invariants at each; returns the number of steps."""
    for num_steps in range(max_steps):
        if not engine.num_unfinished:
            return num_steps
        engine.step()
        engine.ledger.check_integrity()
    raise AssertionError(f"{engine.num_unfinished} completions are not over after {max_steps} steps")


def tokens_of(request: Request, index: int = 0) -> list[int]:
    return request.completions[index].token_ids


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Token ids without the end token and the poison."""
    return [3 + (7 * i + 13 * seed + i * i) % 50 for i in range(length)]
