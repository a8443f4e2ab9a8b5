"""Random weights of the right scale, for runs that need a model's shape and not its knowledge."""

from __future__ import annotations

import math

import torch

from headway.layers.params import ParamSpec

_DT_RANGE = (1e-3, 1e-1)  # steps that Mamba-2 is initialised to
_DECAY_RANGE = (1.0, 16.0)  # -A, likewise


def fill_dummy(
    specs: dict[str, ParamSpec], params: dict[str, torch.Tensor], num_layers: int, seed: int = 0
) -> None:
    """Fills params in place, on their device and in their dtype; the same seed and device give the same weights.

    Linear weights keep the variance of their input and those that write to the residual stream are divided by
    sqrt(2 * num_layers), so that activations stay of order one at any depth.
    """
    device = next(iter(params.values())).device
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, spec in specs.items():
        _fill(params[name], spec, num_layers, generator)


def _fill(param: torch.Tensor, spec: ParamSpec, num_layers: int, generator: torch.Generator) -> None:
    if spec.init == "ones":
        param.fill_(1.0)
    elif spec.init == "zeros":
        param.zero_()
    elif spec.init == "decay":
        param.uniform_(*_DECAY_RANGE, generator=generator).neg_()
    elif spec.init == "dt_bias":
        low, high = (math.log(bound) for bound in _DT_RANGE)
        step = param.uniform_(low, high, generator=generator).exp_()
        param.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
    elif spec.init == "embedding":
        param.normal_(0.0, 1.0, generator=generator)
    else:
        std = 1.0 / math.sqrt(spec.shape[-1])
        param.normal_(
            0.0, std / math.sqrt(2 * num_layers) if spec.init == "output" else std, generator=generator
        )
