"""move_records in plain torch."""

from __future__ import annotations

from torch import Tensor

from headway.ops.move_records import RecordPools


def move_records_ref(pools: RecordPools, moves: Tensor) -> None:
    """Each move is (source index, target index); the pools' targets are updated."""
    for source_index, target_index in moves.tolist():
        for source, target in zip(pools.sources, pools.targets, strict=True):
            target[target_index] = source[source_index]
