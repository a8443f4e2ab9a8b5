"""Turns a step's raw log-probabilities into the dictionaries callers read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headway.outputs import Logprob, TokenLogprobs


def position_logprobs(
    token: int,
    logprob: float,
    rank: int,
    top_ids: Sequence[int],
    top_logprobs: Sequence[float],
    decode: Callable[[int], str] | None,
) -> TokenLogprobs:
    """The chosen token first, then the alternatives, most likely first; unused ids are -1.

    `top_ids` and `top_logprobs` have one entry per alternative asked for.
    """

    def entry(token_id: int, value: float, its_rank: int) -> Logprob:
        return Logprob(value, its_rank, decode(token_id) if decode else None)

    found = {token: entry(token, logprob, rank)}
    for place, (token_id, value) in enumerate(zip(top_ids, top_logprobs, strict=True), start=1):
        if token_id >= 0 and token_id != token:
            found[token_id] = entry(token_id, value, place)
    return found
