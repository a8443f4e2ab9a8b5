"""Carries plans out on a device: begin_step, model, sample, finish_step. Decides nothing and reads no result.

Tokens stay on the device between steps; results reach the host through the ledger's ring.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from headway import ops
from headway.engine.batch import StepBatch
from headway.engine.graphs import DecodeGraphs
from headway.engine.host_tier import HostTier
from headway.engine.rehearsal import rehearse_prompts
from headway.engine.staging import Staging, stage
from headway.errors import IntegrityError

if TYPE_CHECKING:
    from headway._core import LedgerConfig, Plan
    from headway.models.caches import ModelCaches

MAX_KEPT_VIEWS = 1024
LOOK_S = 1e-3  # how often a waiting host asks whether the device is still alive; the ring itself it polls


class StepModel(Protocol):
    """What the runner needs of `headway.models.hybrid.HybridModel`."""

    def forward(self, batch: StepBatch, caches: ModelCaches) -> torch.Tensor: ...
    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...
    def fold_states(
        self, caches: ModelCaches, state_base: torch.Tensor, copies_address: int, num_copies: int
    ) -> None: ...


class Runner:
    """Owns the model, its caches and every fixed buffer of the loop.

    A step is over when its results are in the ring; on a CPU at launch depth 0 that is before `launch` returns.

    Args:
        row_buckets: numbers of rows, ascending up to max_rows, that decode steps are padded to; empty: as planned.
        has_graphs: whether padded steps are captured and replayed; needs a GPU.
    """

    def __init__(
        self,
        model: StepModel,
        caches: ModelCaches,
        config: LedgerConfig,
        device: torch.device,
        *,
        row_buckets: Sequence[int] = (),
        has_graphs: bool = False,
    ) -> None:
        self._model = model
        self._caches = caches
        self._device = device
        self._config = config
        self._row_buckets = tuple(row_buckets)
        self._buffers = ops.StepBuffers.allocate(
            max_rows=config.max_rows + 1,
            max_blocks_per_row=config.max_blocks_per_row,
            max_model_len=config.max_model_len,
            max_step_tokens=config.max_step_tokens,
            max_logprobs=config.max_logprobs,
            max_snapshots=config.max_packet_snapshots,
            max_scored_tokens=config.max_scored_tokens,
            vocab_size=config.vocab_size,
            num_slots=config.num_slots + 1,
            state_window=ops.StateWindow(config.state_window, config.max_rewind),
            device=device,
        )
        self.staging: Staging = stage(config, device)
        self._result_ring_address = self.staging.result_ring_address
        has_host_memory = config.num_host_blocks + config.num_host_slots > 0
        self.host_tier = (
            HostTier(caches, self._buffers.mirror.state_base, config, device) if has_host_memory else None
        )
        self._views: dict[tuple[int, int, int], dict[str, torch.Tensor]] = {}
        self.graphs = DecodeGraphs(self._row_buckets, device) if has_graphs else None

    @property
    def has_gpu(self) -> bool:
        return self._device.type == "cuda"

    def prepare(self, max_capture_s: float) -> None:
        """Warms a GPU up: runs prompts on padding, then captures what graphs it can in that time. Optional; before
        the first launch.
        """
        self.staging.run(self._prepare, max_capture_s)

    def launch(self, plan: Plan) -> None:
        """Puts one step on the device's stream. The plan's packet must live until the step is committed."""
        self.staging.launch(self._run, plan, self._graph_exec_of(plan))

    def wait(self, is_ready: Callable[[], bool]) -> None:
        """Returns when the awaited results are in the ring; raises what the device raised in their place."""
        next_look_s = time.perf_counter() + LOOK_S
        while not is_ready():
            if time.perf_counter() >= next_look_s:
                if self.staging.is_idle() and not is_ready():
                    raise IntegrityError("the device is idle, but the step's results are not in the ring")
                next_look_s = time.perf_counter() + LOOK_S
            self.staging.rest()

    def read_mirror(self) -> ops.StepBuffers:
        """What the device keeps of every row, in host memory, once all that was launched is done."""
        self.staging.synchronize()
        return self._buffers.on_host()

    def poison_slots(self, slots: Sequence[int]) -> None:
        """Fills the states of these slots with NaN, after all that was launched. Nobody may hold them."""
        if slots:
            self.staging.run(self._poison_slots, slots)

    def close(self) -> None:
        """Waits for the device: nothing it may still use is freed under it."""
        try:
            self.staging.close()
        finally:
            if self.host_tier is not None:
                self.host_tier.close()
            if self.graphs is not None:
                self.graphs.close()

    @torch.inference_mode()
    def _prepare(self, max_capture_s: float) -> None:
        if self.has_gpu:
            max_tokens = min(self._config.max_step_tokens, self._config.max_model_len)
            rehearse_prompts(self._buffers, self._caches, self._compute, max_tokens, self.staging.synchronize)
        if self.graphs is not None:
            self.graphs.prepare(self._run_decode, self._rehearse_decode, max_capture_s)

    @torch.inference_mode()
    def _poison_slots(self, slots: Sequence[int]) -> None:
        index = torch.tensor(slots, device=self._device)
        for pool in self._caches.state_pools:
            pool.index_fill_(1, index, torch.nan)

    @torch.inference_mode()
    def _run(self, plan: Plan) -> None:
        self.staging.bring(plan.packet_address, plan.packet_bytes)
        if plan.num_copies:
            copies_address = self.staging.packet_address + plan.copies_offset
            if self._caches.state_log:
                state_base = self._buffers.mirror.state_base
                self._model.fold_states(self._caches, state_base, copies_address, plan.num_copies)
            else:
                ops.copy_states(self._caches.state_pools, copies_address, plan.num_copies)
        if not self._row_buckets or plan.num_rows != plan.num_decode_rows:
            self._run_planned(plan)
            return
        num_rows = self._bucket_of(plan.num_rows)
        self._result_ring_address = self._result_ring_address or self._ring_of(plan)
        if self.graphs is None:
            self._run_decode(num_rows)
        else:
            self.graphs.launch(self._run_decode, num_rows)

    def _graph_exec_of(self, plan: Plan) -> int:
        """Of a captured decode step that is its whole work on the device but for the packet; else 0."""
        if self.graphs is None or plan.num_copies or plan.num_rows != plan.num_decode_rows:
            return 0
        return self.graphs.exec_of(self._bucket_of(plan.num_rows))

    def _bucket_of(self, num_rows: int) -> int:
        return self._row_buckets[bisect_left(self._row_buckets, num_rows)]

    def _run_planned(self, plan: Plan) -> None:
        """Any step, in the plan's own sizes."""
        ops.begin_step(
            self._buffers,
            packet_address=self.staging.packet_address if plan.packet_address else 0,
            num_rows=plan.num_rows,
            num_decode_rows=plan.num_decode_rows,
            num_sampled=plan.num_sampled,
            num_tokens=plan.num_tokens,
        )
        hidden = self._compute(self._batch(plan))
        if plan.num_scored:
            self._score(hidden, plan.num_scored, plan.num_sampled)
        ops.finish_step(
            self._buffers,
            step=plan.step,
            num_rows=plan.num_rows,
            num_decode_rows=plan.num_decode_rows,
            num_sampled=plan.num_sampled,
            num_scored=plan.num_scored,
            result_address=plan.result_address,
            ring_max_results=self._config.max_results,
        )

    def _run_decode(self, num_rows: int) -> None:
        """A decode step padded to num_rows. Nothing here depends on the plan: a graph replays it for any."""
        self._begin_decode(num_rows, self.staging.packet_address, is_replayed=True)
        self._compute(self._decode_batch(num_rows))
        ops.finish_step(
            self._buffers,
            step=0,
            num_rows=num_rows,
            num_decode_rows=num_rows,
            num_sampled=num_rows,
            result_address=self._result_ring_address,
            ring_max_results=self._config.max_results,
            ring_num_entries=self._config.max_launch_depth + 1,
            ring_entry_bytes=self._config.result_entry_bytes,
        )

    def _rehearse_decode(self, num_rows: int) -> None:
        """Every kernel of a decode step, on dummy rows: code is loaded, workspaces are sized, no row is touched."""
        counter = self._buffers.mirror.counter
        kept = counter.clone()
        counter.zero_()  # no live rows
        self._begin_decode(num_rows, 0, is_replayed=False)
        self._compute(self._decode_batch(num_rows))
        nowhere = torch.zeros(self._config.result_entry_bytes, dtype=torch.uint8, device=self._device)
        ops.finish_step(
            self._buffers,
            step=0,
            num_rows=num_rows,
            num_decode_rows=num_rows,
            num_sampled=num_rows,
            result_address=nowhere.data_ptr(),
            ring_max_results=self._config.max_results,
        )
        counter.copy_(kept)

    def _begin_decode(self, num_rows: int, packet_address: int, *, is_replayed: bool) -> None:
        ops.begin_step(
            self._buffers,
            packet_address=packet_address,
            num_rows=num_rows,
            num_decode_rows=num_rows,
            num_sampled=num_rows,
            num_tokens=num_rows,
            is_replayed=is_replayed,
        )

    def _compute(self, batch: StepBatch) -> torch.Tensor:
        """hidden [T, C]"""
        hidden = self._model.forward(batch, self._caches)
        if batch.num_sampled:
            ops.sample(self._buffers, self._model.logits(_sampled_rows(hidden, batch)))
        return hidden

    def _score(self, hidden: torch.Tensor, num_scored: int, num_sampled: int) -> None:
        """Log-probabilities of prompt tokens, as many logits at a time as a step may sample anyway."""
        for begin in range(0, num_scored, self._config.max_rows):
            end = min(begin + self._config.max_rows, num_scored)
            rows = hidden.index_select(0, self._buffers.inputs.score_tokens[begin:end])
            ops.score(self._buffers, self._model.logits(rows), first_score=begin, num_sampled=num_sampled)

    def _ring_of(self, plan: Plan) -> int:
        """The first entry of the ring that the ledger keeps itself."""
        entry_idx = plan.step % (self._config.max_launch_depth + 1)
        return plan.result_address - entry_idx * self._config.result_entry_bytes

    def _batch(self, plan: Plan) -> StepBatch:
        return StepBatch(
            step=plan.step,
            num_rows=plan.num_rows,
            num_decode_rows=plan.num_decode_rows,
            num_sampled=plan.num_sampled,
            num_tokens=plan.num_tokens,
            max_query_len=plan.max_query_len,
            max_kv_len=plan.max_kv_len,
            snapshots=self._snapshots(plan) if plan.num_snapshots else None,
            **self._views_of(plan.num_tokens, plan.num_rows, plan.num_sampled),
        )

    def _snapshots(self, plan: Plan) -> ops.Snapshots:
        inputs, num_snapshots = self._buffers.inputs, plan.num_snapshots
        return ops.Snapshots(
            inputs.snapshot_starts[: plan.num_rows + 1],
            inputs.snapshot_positions[:num_snapshots],
            inputs.snapshot_slots[:num_snapshots],
        )

    def _decode_batch(self, num_rows: int) -> StepBatch:
        """Bounds that hold for every step of so many rows; kernels read the lengths themselves."""
        return StepBatch(
            step=0,
            num_rows=num_rows,
            num_decode_rows=num_rows,
            num_sampled=num_rows,
            num_tokens=num_rows,
            max_query_len=1,
            max_kv_len=self._config.max_model_len,
            snapshots=None,
            **self._views_of(num_rows, num_rows, num_rows),
        )

    def _views_of(self, num_tokens: int, num_rows: int, num_sampled: int) -> dict[str, torch.Tensor]:
        """The used parts of the fixed buffers. Kept: steady decode asks for the same ones at every step."""
        key = (num_tokens, num_rows, num_sampled)
        views = self._views.get(key)
        if views is None:
            if len(self._views) >= MAX_KEPT_VIEWS:
                self._views.clear()
            views = self._views[key] = self._make_views(*key)
        return views

    def _make_views(self, num_tokens: int, num_rows: int, num_sampled: int) -> dict[str, torch.Tensor]:
        inputs = self._buffers.inputs
        return {
            "token_ids": inputs.token_ids[:num_tokens],
            "positions": inputs.positions[:num_tokens],
            "token_rows": inputs.token_rows[:num_tokens],
            "rows": inputs.rows[:num_rows],
            "query_start": inputs.query_start[: num_rows + 1],
            "row_start": inputs.row_start[:num_rows],
            "kv_lens": inputs.kv_lens[:num_rows],
            "read_slots": inputs.read_slots[:num_rows],
            "write_slots": inputs.write_slots[:num_rows],
            "state_base": inputs.state_base[:num_rows],
            "sample_tokens": inputs.sample_tokens[:num_sampled],
            "block_table": self._buffers.mirror.block_table,
        }


def _sampled_rows(hidden: torch.Tensor, batch: StepBatch) -> torch.Tensor:
    """hidden [T, C] -> [Rs, C]. Where as many rows sample as there are tokens, token i is row i's."""
    if batch.num_sampled == batch.num_tokens:
        return hidden
    return hidden.index_select(0, batch.sample_tokens)
