"""Whole Mamba states from slot to slot, between a step's packet and its layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from headway.errors import ArgumentError
from headway.ops.backend import target_of
from headway.ops.checks import check_dense

MAX_STATE_POOLS = 4  # kMaxStatePools of csrc/params/state.h


def copy_states(pools: Sequence[Tensor], copies_address: int, num_copies: int) -> None:
    """Copies states in every layer of every pool, in one launch.

    Args:
        pools: each [Lm, num_slots, ...] contiguous, of Lm Mamba layers; updated.
        copies_address: of StateCopy records in memory that the device reads. No slot is the target of one copy and
            named by another; a copy onto itself does nothing.
        num_copies: so many.
    """
    op = "copy_states"
    if not pools or len(pools) > MAX_STATE_POOLS:
        raise ArgumentError(f"{op}: pools must be 1 to {MAX_STATE_POOLS}, got {len(pools)}")
    num_layers = pools[0].shape[0]
    records = []
    for pool in pools:
        if pool.shape[0] != num_layers:
            raise ArgumentError(f"{op}: pools must have {num_layers} layers each, got {pool.shape[0]}")
        check_dense(op, "pools", pool)
        layer_bytes = pool.stride(0) * pool.itemsize
        records.append((pool.data_ptr(), layer_bytes, pool.stride(1) * pool.itemsize))
    kernels, stream = target_of(pools[0])
    kernels.copy_states(num_copies, copies_address, num_layers, records, stream)
