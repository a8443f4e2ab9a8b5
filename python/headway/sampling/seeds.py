"""Where seeds come from. A sample depends on (seed, position) alone, so this is all the randomness there is."""

from __future__ import annotations

import random

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


class SeedSource:
    """Seeds for requests that bring none: the k-th such request of an engine always gets the same one."""

    def __init__(self, engine_seed: int) -> None:
        self._draws = random.Random(engine_seed)

    def draw(self) -> int:
        return self._draws.getrandbits(64)


def completion_seed(request_seed: int, index: int) -> int:
    """Seed of the index-th of a request's n completions; the first keeps the request's own.

    The others are SplitMix64 outputs (Steele et al., 2014): neighbouring request seeds share no completion.
    """
    if index == 0:
        return request_seed
    mixed = (request_seed + index * _GOLDEN) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)
