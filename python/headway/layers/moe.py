"""Mixture of experts: a router in fp32 picks top_k experts a token; shared experts see every token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from headway import ops
from headway.layers.linear import Linear
from headway.layers.params import Params, ParamSpec
from headway.layers.router import Router
from headway.layers.scratch import Take
from headway.models.config import MoeConfig

if TYPE_CHECKING:
    from headway.engine.batch import StepBatch
    from headway.models.caches import ModelCaches


def moe_specs(moe: MoeConfig, hidden_size: int) -> dict[str, ParamSpec]:
    experts, width = moe.num_experts, 2 if moe.is_gated else 1
    expert_dim = moe.latent_size or hidden_size
    specs = {
        "router": ParamSpec((experts, hidden_size), is_float32=True),
        "expert_in": ParamSpec((experts, width * moe.intermediate_size, expert_dim)),  # rows: gate, up
        "expert_out": ParamSpec((experts, expert_dim, moe.intermediate_size), "output"),
    }
    if moe.has_score_bias:
        specs["score_bias"] = ParamSpec((experts,), "zeros", is_float32=True)
    if moe.latent_size:
        specs["latent_in"] = ParamSpec((moe.latent_size, hidden_size))
        specs["latent_out"] = ParamSpec((hidden_size, moe.latent_size))
    if moe.shared_intermediate_size:
        specs["shared_in"] = ParamSpec((width * moe.shared_intermediate_size, hidden_size))
        specs["shared_out"] = ParamSpec((hidden_size, moe.shared_intermediate_size), "output")
    return specs


@dataclass(frozen=True)
class MoeScratch:
    """Buffers of one step."""

    router_logits: torch.Tensor  # [T, E] float32
    shared_projected: torch.Tensor  # [T, F or 2F] of the shared expert
    shared_activated: torch.Tensor  # [T, F] of the shared expert
    latent: torch.Tensor  # [T, latent], input of the routed experts
    widened: torch.Tensor  # [T, C], their output, where they work in a latent space

    @classmethod
    def allocate(cls, moe: MoeConfig, hidden_size: int, take: Take) -> MoeScratch:
        width = moe.shared_intermediate_size * (2 if moe.is_gated else 1)
        return cls(
            take("router_logits", moe.num_experts, torch.float32),
            take("shared_projected", width, None),
            take("shared_activated", moe.shared_intermediate_size, None),
            take("expert_latent", moe.latent_size, None),
            take("expert_widened", hidden_size if moe.latent_size else 0, None),
        )


class Moe:
    """One layer."""

    def __init__(self, moe: MoeConfig, params: Params, is_invariant: bool = False) -> None:
        self.moe = moe
        self.router = Router(moe, params, is_invariant)
        self.expert_in, self.expert_out = params["expert_in"], params["expert_out"]
        linear = partial(Linear, is_invariant=is_invariant)
        self.latent_in = linear(params["latent_in"]) if moe.latent_size else None
        self.latent_out = linear(params["latent_out"]) if moe.latent_size else None
        has_shared = moe.shared_intermediate_size > 0
        self.shared_in = linear(params["shared_in"]) if has_shared else None
        self.shared_out = linear(params["shared_out"]) if has_shared else None
        self.is_invariant = is_invariant

    def __call__(
        self,
        hidden: torch.Tensor,
        batch: StepBatch,
        caches: ModelCaches,
        scratch: MoeScratch,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """hidden [T, C] -> [T, C], in memory that the expert op allocates; keeps nothing between steps.

        The shared expert's first half comes between the choice and the experts: its matrix is on its way while the
        few threads of the choice run.
        """
        routing = self.router(hidden, scratch.router_logits)
        if self.shared_in is None or self.shared_out is None:
            return self._routed_experts(hidden, routing, scratch)
        projected = self.shared_in(hidden, scratch.shared_projected)
        ops.activation(projected, self.moe.activation, self.moe.is_gated, out=scratch.shared_activated)
        mixed = self._routed_experts(hidden, routing, scratch)
        return self.shared_out.onto(scratch.shared_activated, mixed)

    def _routed_experts(
        self, hidden: torch.Tensor, routing: ops.Routing, scratch: MoeScratch
    ) -> torch.Tensor:
        if self.latent_in is None or self.latent_out is None:
            return self._experts(hidden, routing)
        latent = self._experts(self.latent_in(hidden, scratch.latent), routing)
        return self.latent_out(latent, scratch.widened)

    def _experts(self, hidden: torch.Tensor, routing: ops.Routing) -> torch.Tensor:
        """hidden [T, C or latent] -> the same shape."""
        moe = self.moe
        return ops.moe_experts(
            hidden,
            routing,
            self.expert_in,
            self.expert_out,
            moe.activation,
            moe.is_gated,
            is_invariant=self.is_invariant,
        )
