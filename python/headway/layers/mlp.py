"""Feed-forward layers: act(x W_up) W_down, or with a gate, act(x W_gate) * (x W_up) W_down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headway import ops
from headway.layers.linear import Linear
from headway.layers.params import Params, ParamSpec
from headway.layers.scratch import Take
from headway.models.config import MlpConfig

if TYPE_CHECKING:
    from headway.engine.batch import StepBatch
    from headway.models.caches import ModelCaches


def mlp_specs(mlp: MlpConfig, hidden_size: int) -> dict[str, ParamSpec]:
    width = mlp.intermediate_size * (2 if mlp.is_gated else 1)
    specs = {
        "in_proj": ParamSpec((width, hidden_size)),  # rows: gate, up
        "out_proj": ParamSpec((hidden_size, mlp.intermediate_size), "output"),
    }
    if mlp.bias:
        specs["in_proj_bias"] = ParamSpec((width,), "zeros")
        specs["out_proj_bias"] = ParamSpec((hidden_size,), "zeros")
    return specs


@dataclass(frozen=True)
class MlpScratch:
    """Buffers of one step."""

    projected: torch.Tensor  # [T, F or 2F]
    activated: torch.Tensor  # [T, F]

    @classmethod
    def allocate(cls, mlp: MlpConfig, take: Take) -> MlpScratch:
        width = mlp.intermediate_size * (2 if mlp.is_gated else 1)
        return cls(take("mlp_projected", width, None), take("mlp_activated", mlp.intermediate_size, None))


class Mlp:
    """One layer."""

    def __init__(self, mlp: MlpConfig, params: Params, is_invariant: bool = False) -> None:
        self.in_proj = Linear(params["in_proj"], params.get("in_proj_bias"), is_invariant=is_invariant)
        self.out_proj = Linear(params["out_proj"], params.get("out_proj_bias"), is_invariant=is_invariant)
        self.activation, self.is_gated = mlp.activation, mlp.is_gated

    def __call__(
        self,
        hidden: torch.Tensor,
        batch: StepBatch,
        caches: ModelCaches,
        scratch: MlpScratch,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """hidden [T, C] -> out [T, C]; keeps nothing between steps."""
        projected = self.in_proj(hidden, scratch.projected)
        ops.activation(projected, self.activation, self.is_gated, out=scratch.activated)
        return self.out_proj(scratch.activated, out)
