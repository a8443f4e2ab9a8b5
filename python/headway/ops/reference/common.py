"""What the references share: the precision they compute in, and how they deliver a result."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in the precision the reference computes in: float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def deliver(result: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """result rounded once to dtype, written to out where the caller gave one."""
    return result.to(dtype) if out is None else out.copy_(result)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
