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
        self.weight = params["router"]  # [E, C] fp32
        self._linear = Linear(self.weight)
        device = self.weight.device
        self._num_done = torch.zeros(ops.NUM_ROUTE_GROUPS, dtype=torch.int32, device=device)
        self._num_experts, self.top_k = moe.num_experts, moe.top_k
        self.rule: dict[str, Any] = {  # keyword arguments of `ops.route`
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
            return ops.route_hidden(hidden, self.weight, self.top_k, self._num_done, **self.rule)
        return ops.route(self._linear(hidden.float(), logits), self.top_k, **self.rule)
