"""Which experts a model chose for each token, read off while it runs."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch

from headway import ops
from headway.engine.batch import StepBatch
from headway.layers.moe import Moe
from headway.models.hybrid import HybridModel


class ExpertLog:
    """Listens to a model from now on; what a row computes again replaces what it chose before."""

    def __init__(self, model: HybridModel) -> None:
        self._chosen: dict[int, dict[tuple[int, int], list[int]]] = defaultdict(
            dict
        )  # layer: (row, position)
        self._places: list[tuple[int, int]] = []  # (row, position) of each token of the step that runs
        model.forward = partial(self._forward, model.forward)  # type: ignore[method-assign]
        for layer_idx, layer in enumerate(model._layers):
            if isinstance(layer, Moe):
                layer.router = partial(self._route, layer_idx, layer.router)  # type: ignore[assignment]

    def of_row(self, row: int, num_tokens: int) -> dict[int, list[list[int]]]:
        """By layer, the experts of the row's first tokens."""
        return {
            layer_idx: [chosen[row, position] for position in range(num_tokens)]
            for layer_idx, chosen in self._chosen.items()
        }

    def _forward(self, forward: Any, batch: StepBatch, caches: Any) -> torch.Tensor:
        rows, token_rows = batch.rows.tolist(), batch.token_rows.tolist()
        self._places = [(rows[i], p) for i, p in zip(token_rows, batch.positions.tolist(), strict=True)]
        hidden: torch.Tensor = forward(batch, caches)
        return hidden

    def _route(self, layer_idx: int, route: Any, *args: Any) -> ops.Routing:
        routing: ops.Routing = route(*args)
        self._chosen[layer_idx].update(zip(self._places, routing.expert_ids.tolist(), strict=True))
        return routing
