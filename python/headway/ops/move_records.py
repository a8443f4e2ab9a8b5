"""Records by index between two places, many at once: KV blocks and states between a device and pinned host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headway.errors import ArgumentError
from headway.ops.backend import target_of
from headway.ops.checks import check_dense

PIECE_BYTES = 16384  # kPieceBytes of csrc/params/records.h


@dataclass(frozen=True)
class RecordPools:
    """Pairs of tensors [n, ...] and [m, ...] with records of one size and dtype; m and n may differ."""

    sources: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    table: Tensor  # [len(sources), 6] int64, RecordPool of csrc/params/records.h, where the kernels run
    num_pieces: int

    @staticmethod
    def pair(sources: Sequence[Tensor], targets: Sequence[Tensor], device: torch.device) -> RecordPools:
        """Raises ArgumentError where two tensors' records differ or are not contiguous."""
        op, rows, num_pieces = "move_records", [], 0
        for source, target in zip(sources, targets, strict=True):
            if source.shape[1:] != target.shape[1:] or source.dtype != target.dtype:
                raise ArgumentError(
                    f"{op}: records of {list(source.shape[1:])} {source.dtype} cannot move to "
                    f"{list(target.shape[1:])} {target.dtype}"
                )
            check_dense(op, "sources", source)
            check_dense(op, "targets", target)
            record_bytes = source.stride(0) * source.itemsize
            rows.append(
                (
                    source.data_ptr(),
                    target.data_ptr(),
                    record_bytes,
                    record_bytes,
                    record_bytes,
                    num_pieces,
                )
            )
            num_pieces += -(-record_bytes // PIECE_BYTES)
        table = torch.from_numpy(np.array(rows, np.int64).reshape(len(rows), 6)).to(device)
        return RecordPools(tuple(sources), tuple(targets), table, num_pieces)


def move_records(pools: RecordPools, moves: Tensor, max_thread_blocks: int = 32) -> None:
    """targets[i][moves[k, 1]] = sources[i][moves[k, 0]] for every pool i and move k, in one launch.

    Args:
        moves: [k, 2] int32 in memory that the device reads, of indices that are there; targets differ.
        max_thread_blocks: of a GPU, for all of it; at least 1.

    Raises:
        ArgumentError: moves or max_thread_blocks are not as said.
    """
    if max_thread_blocks < 1:
        raise ArgumentError(f"move_records: max_thread_blocks must be at least 1, got {max_thread_blocks}")
    if moves.ndim != 2 or moves.shape[1] != 2 or moves.dtype != torch.int32 or not moves.is_contiguous():
        raise ArgumentError(
            f"move_records: moves must be [k, 2] int32, got {list(moves.shape)} {moves.dtype}"
        )
    kernels, stream = target_of(pools.table)
    kernels.move_records(
        moves.shape[0],
        moves.data_ptr(),
        len(pools.sources),
        pools.table.data_ptr(),
        pools.num_pieces,
        max_thread_blocks,
        stream,
    )
