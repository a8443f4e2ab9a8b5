"""One step as the model sees it: a few host numbers and views of device buffers whose addresses never change."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from headway.ops import Snapshots


@dataclass(frozen=True)
class RowTensors:
    """Rows as the recurrent ops take them."""

    query_start: torch.Tensor
    row_start: torch.Tensor
    read_slots: torch.Tensor
    write_slots: torch.Tensor
    snapshots: Snapshots | None


@dataclass(frozen=True)
class StepBatch:
    """Inputs of one step. Host numbers come from the plan; `ops.begin_step` fills the tensors on the device.

    Rows are ordered: decode rows (one token each), then prompt chunks; the first `num_sampled` rows sample.
    """

    step: int
    num_rows: int  # R
    num_decode_rows: int
    num_sampled: int  # Rs
    num_tokens: int  # T
    max_query_len: int
    max_kv_len: int
    token_ids: torch.Tensor  # [T] int32
    positions: torch.Tensor  # [T] int32, absolute
    token_rows: torch.Tensor  # [T] int32, index into the step's rows
    rows: torch.Tensor  # [R] int32, row ids
    query_start: torch.Tensor  # [R + 1] int32, prefix sums of the rows' tokens
    row_start: torch.Tensor  # [R] int32, absolute position of each row's first token
    kv_lens: torch.Tensor  # [R] int32, tokens in the sequence after this step
    read_slots: torch.Tensor  # [R] int32, Mamba state slots the rows continue from
    write_slots: torch.Tensor  # [R] int32, Mamba state slots of the rows themselves
    state_base: torch.Tensor  # [R] int32, tokens folded into the state in read_slots
    sample_tokens: torch.Tensor  # [Rs] int32, index into [T]
    block_table: torch.Tensor  # [max_rows, max_blocks_per_row] int32, by row id
    snapshots: Snapshots | None = None  # states that prompt chunks leave beside the rows' own

    @cached_property
    def all_rows(self) -> RowTensors:
        return RowTensors(self.query_start, self.row_start, self.read_slots, self.write_slots, self.snapshots)

    @cached_property
    def chunk_rows(self) -> RowTensors:
        """The prompt chunks of a step that also decodes, their tokens counted from the first chunk's on."""
        first = self.num_decode_rows
        snapshots = self.snapshots
        return RowTensors(
            self.query_start[first:] - first,
            self.row_start[first:],
            self.read_slots[first:],
            self.write_slots[first:],
            None if snapshots is None else snapshots._replace(starts=snapshots.starts[first:]),
        )
