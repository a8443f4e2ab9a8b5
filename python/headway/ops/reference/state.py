"""copy_states in plain torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor


def copy_states_ref(pools: Sequence[Tensor], copies: Iterable[tuple[int, int]]) -> None:
    """Each copy is (from slot, to slot); pools [Lm, num_slots, ...] are updated."""
    for source, target in copies:
        for pool in pools:
            pool[:, target] = pool[:, source].clone()
