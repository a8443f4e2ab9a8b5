"""Which experts each token goes to: a product in fp32 and a choice, one launch for the few tokens of a decode step."""

from __future__ import annotations

from typing import Any

import torch

from headway import ops
from headway.layers.linear import Linear
from headway.layers.params import Params
from headway.models.config import MoeConfig


class Router:
    def __init__(self, moe: MoeConfig, params: Params, is_invariant: bool = False) -> None:
        self._is_fused = is_invariant and params["router"].is_cuda  # at any number of tokens
        self._weight = params["router"]  # [E, C] fp32
        self._linear = Linear(self._weight)
        self._num_done = torch.zeros(1, dtype=torch.int32, device=self._weight.device)  # of the one launch
        self._num_experts, self._top_k = moe.num_experts, moe.top_k
        self._rule: dict[str, Any] = {
            "score": moe.score,
            "bias": params.get("score_bias"),
            "normalise": moe.normalise,
            "scale": moe.scale,
            "num_groups": moe.num_groups,
            "topk_group": moe.topk_group,
        }

    def __call__(self, hidden: torch.Tensor, logits: torch.Tensor) -> ops.Routing:
        """hidden [T, C] -> the choice of top_k experts a token; `logits` [T, E] float32 is scratch memory."""
        if self._is_fused or ops.fits_route_hidden(hidden, self._num_experts):
            return ops.route_hidden(hidden, self._weight, self._top_k, self._num_done, **self._rule)
        return ops.route(self._linear(hidden.float(), logits), self._top_k, **self._rule)
