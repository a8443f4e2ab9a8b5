"""How a layer declares its weights, once, for everyone: the loader, the random initialiser and the memory budget.

A declaration is a `ParamSpec` by name; a layer object holds the tensors of that shape. Knows nothing of checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

# How random weights are drawn, so that activations neither vanish nor explode: "linear" keeps the variance of its
# input, "output" is a linear that writes to the residual stream, "decay" and "dt_bias" follow Mamba-2's own
# initialisation (state-spaces/mamba, modules/mamba2.py).
Init = Literal["linear", "output", "embedding", "ones", "zeros", "decay", "dt_bias"]

Params = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ParamSpec:
    """Shape of one weight. The last dimension of a matrix is the one it contracts with."""

    shape: tuple[int, ...]
    init: Init = "linear"
    is_float32: bool = False  # kept in fp32 whatever the model's dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def is_odd_matrix(self, num_columns: int) -> bool:
        """Whether rows of this matrix are no multiple of so many columns."""
        return len(self.shape) > 1 and self.shape[-1] % num_columns != 0

    def num_bytes(self, dtype: torch.dtype) -> int:
        return self.numel * (4 if self.is_float32 else dtype.itemsize)
