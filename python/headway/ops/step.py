"""The three ops around a step's layers: begin_step, sample, finish_step, and the device buffers they share.

The device advances by itself: a step's inputs follow from the mirror and, when the host has something to say, from one
packet. The records are those of csrc/core/step_layout.h; `ops.layout` has them as numpy dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from headway.errors import ArgumentError
from headway.ops.backend import target_of
from headway.ops.layout import (
    MAX_BAD_WORD_ENTRIES,
    MAX_LOGIT_BIAS,
    MAX_STOP_IDS,
    RESULT_ROW,
    ROW_SAMPLING,
    STEP_COUNTER,
    STEP_ROW,
)
from headway.ops.state_log import IN_PLACE, StateWindow


@dataclass(frozen=True)
class StepMirror:
    """What the device keeps of every row; entry 0 is the dummy row. Integers are int32."""

    last_token: Tensor  # [max_rows]
    num_computed: Tensor  # [max_rows]
    state_base: Tensor  # [num_slots]
    slot: Tensor  # [max_rows]
    stopped: Tensor  # [max_rows]
    block_table: Tensor  # [max_rows, max_blocks_per_row]
    history: Tensor  # [max_rows, max_model_len]
    sampling: Tensor  # [max_rows, 80] uint8: RowSampling
    stop_ids: Tensor  # [max_rows, MAX_STOP_IDS]
    bias_ids: Tensor  # [max_rows, MAX_LOGIT_BIAS]
    bias_values: Tensor  # [max_rows, MAX_LOGIT_BIAS] float32
    live: Tensor  # [max_rows, 6]: StepRow
    counter: Tensor  # [24] uint8: StepCounter
    bad_words: Tensor  # [max_rows, MAX_BAD_WORD_ENTRIES] ends, then tokens
    token_masks: Tensor  # [max_rows, ceil(V / 32)] bits


@dataclass(frozen=True)
class StepInputs:
    """What begin_step derives for the layers. Buffers of the largest step; a step uses their first entries. int32."""

    token_ids: Tensor  # [max_step_tokens]
    positions: Tensor  # [max_step_tokens]
    token_rows: Tensor  # [max_step_tokens]
    rows: Tensor  # [max_rows]
    query_start: Tensor  # [max_rows + 1]
    row_start: Tensor  # [max_rows]
    kv_lens: Tensor  # [max_rows]
    read_slots: Tensor  # [max_rows]
    write_slots: Tensor  # [max_rows]
    state_base: Tensor  # [max_rows]
    sample_tokens: Tensor  # [max_rows]
    snapshot_starts: Tensor  # [max_rows + 1]
    snapshot_positions: Tensor  # [max_snapshots]
    snapshot_slots: Tensor  # [max_snapshots]
    score_tokens: Tensor  # [max_scored_tokens] index into the step's tokens
    score_rows: Tensor  # [max_scored_tokens] row ids
    score_targets: Tensor  # [max_scored_tokens] the token that follows

    @classmethod
    def allocate(
        cls,
        max_rows: int,
        max_step_tokens: int,
        max_snapshots: int,
        max_scored_tokens: int,
        device: torch.device | str,
    ) -> StepInputs:
        """Zeros."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            token_ids=zeros(max_step_tokens),
            positions=zeros(max_step_tokens),
            token_rows=zeros(max_step_tokens),
            rows=zeros(max_rows),
            query_start=zeros(max_rows + 1),
            row_start=zeros(max_rows),
            kv_lens=zeros(max_rows),
            read_slots=zeros(max_rows),
            write_slots=zeros(max_rows),
            state_base=zeros(max_rows),
            sample_tokens=zeros(max_rows),
            snapshot_starts=zeros(max_rows + 1),
            snapshot_positions=zeros(max_snapshots),
            snapshot_slots=zeros(max_snapshots),
            score_tokens=zeros(max_scored_tokens),
            score_rows=zeros(max_scored_tokens),
            score_targets=zeros(max_scored_tokens),
        )


@dataclass(frozen=True)
class StepResults:
    """What sample and score leave for finish_step, in device memory: sampled rows first, scored tokens after them."""

    rows: Tensor  # [max_rows + max_scored_tokens, 24] uint8: ResultRow
    top_ids: Tensor  # [max_rows + max_scored_tokens, max_logprobs] int32
    top_logprobs: Tensor  # [max_rows + max_scored_tokens, max_logprobs] float32


@dataclass(frozen=True)
class StepBuffers:
    """Every fixed buffer of the engine's loop on one device."""

    mirror: StepMirror
    inputs: StepInputs
    results: StepResults
    state_window: StateWindow = IN_PLACE

    @staticmethod
    def allocate(
        *,
        max_rows: int,
        max_blocks_per_row: int,
        max_model_len: int,
        max_step_tokens: int,
        max_logprobs: int,
        max_snapshots: int = 0,
        vocab_size: int,
        max_scored_tokens: int = 0,
        num_slots: int = 1,
        state_window: StateWindow = IN_PLACE,
        device: torch.device | str,
    ) -> StepBuffers:
        """Zeroed buffers. max_rows counts the dummy row, num_slots the dummy slot; at least one block a row is kept for
        models without KV."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        mirror = StepMirror(
            last_token=zeros(max_rows),
            num_computed=zeros(max_rows),
            state_base=zeros(num_slots),
            slot=zeros(max_rows),
            stopped=zeros(max_rows),
            block_table=zeros(max_rows, max(1, max_blocks_per_row)),
            history=zeros(max_rows, max_model_len),
            sampling=zeros(max_rows, ROW_SAMPLING.itemsize, dtype=torch.uint8),
            stop_ids=zeros(max_rows, MAX_STOP_IDS),
            bias_ids=zeros(max_rows, MAX_LOGIT_BIAS),
            bias_values=zeros(max_rows, MAX_LOGIT_BIAS, dtype=torch.float32),
            live=zeros(max_rows, STEP_ROW.itemsize // 4),
            counter=zeros(STEP_COUNTER.itemsize, dtype=torch.uint8),
            bad_words=zeros(max_rows, MAX_BAD_WORD_ENTRIES),
            token_masks=zeros(max_rows, (vocab_size + 31) // 32),
        )
        inputs = StepInputs.allocate(max_rows, max_step_tokens, max_snapshots, max_scored_tokens, device)
        max_results = max_rows + max_scored_tokens
        results = StepResults(
            rows=zeros(max_results, RESULT_ROW.itemsize, dtype=torch.uint8),
            top_ids=zeros(max_results, max_logprobs),
            top_logprobs=zeros(max_results, max_logprobs, dtype=torch.float32),
        )
        return StepBuffers(mirror, inputs, results, state_window)

    def on_host(self) -> StepBuffers:
        """The mirror copied to host memory; on a CPU these very buffers. Waits for torch's current stream."""
        tensors = {field.name: getattr(self.mirror, field.name).cpu() for field in fields(StepMirror)}
        return StepBuffers(StepMirror(**tensors), self.inputs, self.results, self.state_window)

    @property
    def max_rows(self) -> int:
        return self.mirror.slot.shape[0]

    @property
    def max_step_tokens(self) -> int:
        return self.inputs.token_ids.shape[0]

    @property
    def max_logprobs(self) -> int:
        return self.results.top_ids.shape[1]

    @cached_property
    def mirror_arguments(self) -> tuple[int, ...]:
        """DeviceMirror, as csrc/bind/step.cpp takes it."""
        mirror = self.mirror
        return (
            self.max_rows,
            mirror.block_table.shape[1],
            mirror.history.shape[1],
            mirror.last_token.data_ptr(),
            mirror.num_computed.data_ptr(),
            mirror.state_base.data_ptr(),
            mirror.slot.data_ptr(),
            mirror.stopped.data_ptr(),
            mirror.block_table.data_ptr(),
            mirror.history.data_ptr(),
            mirror.sampling.data_ptr(),
            mirror.stop_ids.data_ptr(),
            mirror.bias_ids.data_ptr(),
            mirror.bias_values.data_ptr(),
            mirror.live.data_ptr(),
            mirror.counter.data_ptr(),
            mirror.bad_words.data_ptr(),
            mirror.token_masks.data_ptr(),
            mirror.token_masks.shape[1],
            self.state_window.num_tokens,
            self.state_window.max_rewind,
        )

    @cached_property
    def input_arguments(self) -> tuple[int, ...]:
        """StepInputs, in the order of its fields."""
        inputs = self.inputs
        return (
            inputs.token_ids.data_ptr(),
            inputs.positions.data_ptr(),
            inputs.token_rows.data_ptr(),
            inputs.rows.data_ptr(),
            inputs.query_start.data_ptr(),
            inputs.row_start.data_ptr(),
            inputs.kv_lens.data_ptr(),
            inputs.read_slots.data_ptr(),
            inputs.write_slots.data_ptr(),
            inputs.state_base.data_ptr(),
            inputs.sample_tokens.data_ptr(),
            inputs.snapshot_starts.data_ptr(),
            inputs.snapshot_positions.data_ptr(),
            inputs.snapshot_slots.data_ptr(),
            inputs.score_tokens.data_ptr(),
            inputs.score_rows.data_ptr(),
            inputs.score_targets.data_ptr(),
        )

    @cached_property
    def result_arguments(self) -> tuple[int, ...]:
        results = self.results
        return (results.rows.data_ptr(), results.top_ids.data_ptr(), results.top_logprobs.data_ptr())


def begin_step(
    buffers: StepBuffers,
    *,
    packet_address: int,
    num_rows: int,
    num_decode_rows: int,
    num_sampled: int,
    num_tokens: int,
    is_replayed: bool = False,
) -> None:
    """Applies the packet to the mirror and derives the layers' inputs.

    Args:
        buffers: updated.
        packet_address: of the packet, in memory the device can read; 0 when there is none: the rows of the last
            packet decode one token each.
        num_rows: R of this step, as in the plan, likewise the other counts.
        num_decode_rows: the first rows, which decode one token each.
        num_sampled: the first rows, which sample.
        num_tokens: T.
        is_replayed: for arguments that stay the same from step to step: what lies at packet_address is news only when
            its step follows the device's counter, and rows beyond the live ones are padding.

    A row the device has stopped becomes the dummy: row, slots, token, position and row start 0, KV length 1, and its
    snapshots are left out. A packet may bring at most the snapshots that the buffers were allocated for.
    """
    if (
        num_rows >= buffers.max_rows
        or not 0 <= num_decode_rows <= num_rows
        or not 0 <= num_sampled <= num_rows
    ):
        raise ArgumentError(
            f"begin_step: rows must be below {buffers.max_rows} with decode and sampled rows among them, got "
            f"num_rows {num_rows}, num_decode_rows {num_decode_rows}, num_sampled {num_sampled}"
        )
    if num_tokens > buffers.max_step_tokens:
        raise ArgumentError(
            f"begin_step: num_tokens must be at most {buffers.max_step_tokens}, got {num_tokens}"
        )
    kernels, stream = target_of(buffers.mirror.slot)
    kernels.begin_step(
        packet_address,
        num_rows,
        num_decode_rows,
        num_sampled,
        num_tokens,
        buffers.mirror_arguments,
        buffers.input_arguments,
        is_replayed,
        stream,
    )


def finish_step(
    buffers: StepBuffers,
    *,
    step: int,
    num_rows: int,
    num_decode_rows: int,
    num_sampled: int,
    result_address: int,
    ring_max_results: int,
    num_scored: int = 0,
    ring_num_entries: int = 0,
    ring_entry_bytes: int = 0,
) -> None:
    """Advances the mirror by what was sampled, and publishes the results to the ring entry, its step number last.

    Args:
        buffers: updated.
        step: the plan's number.
        num_rows: R.
        num_decode_rows: the first rows, which decode.
        num_sampled: Rs.
        result_address: of the ring entry, in host memory the device can write.
        ring_max_results: an entry has room for.
        num_scored: results after those of the sampled rows.
        ring_num_entries: above 0 for arguments that stay the same from step to step: result_address is then that of the
            first of so many entries, and the step, its entry and its number of sampled rows come from the counter.
        ring_entry_bytes: from one entry to the next.
    """
    if num_sampled + num_scored > ring_max_results:
        raise ArgumentError(
            f"finish_step: num_sampled and num_scored must be at most {ring_max_results} together, "
            f"got {num_sampled} and {num_scored}"
        )
    kernels, stream = target_of(buffers.mirror.slot)
    kernels.finish_step(
        step,
        num_rows,
        num_decode_rows,
        num_sampled,
        num_scored,
        buffers.max_logprobs,
        buffers.mirror_arguments,
        buffers.input_arguments,
        *buffers.result_arguments,
        result_address,
        ring_max_results,
        ring_num_entries,
        ring_entry_bytes,
        stream,
    )
