"""Carries plans out on a device: begin_step, model, sample, finish_step. Decides nothing and reads no result.

Tokens stay on the device between steps; results reach the host through the ledger's ring.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from headway import ops
from headway.engine.batch import StepBatch
from headway.engine.staging import Staging, stage
from headway.errors import IntegrityError

if TYPE_CHECKING:
    from headway._core import LedgerConfig, Plan
    from headway.models.caches import ModelCaches

MAX_KEPT_VIEWS = 1024


class StepModel(Protocol):
    """What the runner needs of `headway.models.hybrid.HybridModel`."""

    def forward(self, batch: StepBatch, caches: ModelCaches) -> torch.Tensor: ...
    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


class Runner:
    """Owns the model, its caches and every fixed buffer of the loop.

    A step is over when its results are in the ring; on a CPU that is before `launch` returns.
    """

    def __init__(
        self, model: StepModel, caches: ModelCaches, config: LedgerConfig, device: torch.device
    ) -> None:
        self._model = model
        self._caches = caches
        self._device = device
        self._max_rows = config.max_rows
        self._buffers = ops.StepBuffers.allocate(
            max_rows=config.max_rows + 1,
            max_blocks_per_row=config.max_blocks_per_row,
            max_model_len=config.max_model_len,
            max_step_tokens=config.max_step_tokens,
            max_logprobs=config.max_logprobs,
            device=device,
        )
        self.staging: Staging = stage(config, device)
        self._views: dict[tuple[int, int, int], dict[str, torch.Tensor]] = {}

    @torch.inference_mode()
    def launch(self, plan: Plan) -> None:
        """Puts one step on the device's stream. The plan's packet must live until the step is committed."""
        self._begin(plan)
        batch = self._batch(plan)
        hidden = self._model.forward(batch, self._caches)
        if plan.num_sampled:
            ops.sample(self._buffers, self._model.logits(_sampled_rows(hidden, batch)))
        ops.finish_step(
            self._buffers,
            step=plan.step,
            num_rows=plan.num_rows,
            num_sampled=plan.num_sampled,
            result_address=plan.result_address,
            ring_max_rows=self._max_rows,
        )

    def wait(self, is_ready: Callable[[], bool]) -> None:
        """Returns when the awaited results are in the ring; raises what the device raised in their place."""
        while not is_ready():
            if self.staging.is_idle() and not is_ready():
                raise IntegrityError("the device is idle, but the step's results are not in the ring")
            time.sleep(0)

    def close(self) -> None:
        """Waits for the device: nothing it may still write is freed under it."""
        self.staging.synchronize()

    def _begin(self, plan: Plan) -> None:
        ops.begin_step(
            self._buffers,
            packet_address=self.staging.bring(plan.packet_address, plan.packet_bytes),
            num_rows=plan.num_rows,
            num_decode_rows=plan.num_decode_rows,
            num_sampled=plan.num_sampled,
            num_tokens=plan.num_tokens,
        )

    def _batch(self, plan: Plan) -> StepBatch:
        return StepBatch(
            step=plan.step,
            num_rows=plan.num_rows,
            num_decode_rows=plan.num_decode_rows,
            num_sampled=plan.num_sampled,
            num_tokens=plan.num_tokens,
            max_query_len=plan.max_query_len,
            max_kv_len=plan.max_kv_len,
            **self._views_of(plan.num_tokens, plan.num_rows, plan.num_sampled),
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
            "slots": inputs.slots[:num_rows],
            "sample_tokens": inputs.sample_tokens[:num_sampled],
            "block_table": self._buffers.mirror.block_table,
        }


def _sampled_rows(hidden: torch.Tensor, batch: StepBatch) -> torch.Tensor:
    """hidden [T, C] -> [Rs, C]. Where as many rows sample as there are tokens, token i is row i's."""
    if batch.num_sampled == batch.num_tokens:
        return hidden
    return hidden.index_select(0, batch.sample_tokens)
