"""Normalisations in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.ops.reference.common import deliver, silu, wide


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """x / rms(x) * weight per token: x [T, C], weight [C] -> [T, C]."""
    values = wide(x)
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return deliver(values * scale * wide(weight), x.dtype, out)


def add_rms_norm_ref(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    residual_scale: float = 1.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """residual += residual_scale * x in place; the norm is that of the residual as stored."""
    residual.copy_(wide(residual) + residual_scale * wide(x))
    return rms_norm_ref(residual, weight, eps, out=out)


def gated_rms_norm_ref(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, *, out: Tensor | None = None
) -> Tensor:
    """Norm of y * silu(z) over groups of group_size channels, times weight: y, z [T, d] -> [T, d]."""
    gated = wide(y) * silu(wide(z))
    groups = gated.reshape(len(gated), gated.shape[1] // group_size, group_size)
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return deliver((groups * scale).reshape(gated.shape) * wide(weight), y.dtype, out)
