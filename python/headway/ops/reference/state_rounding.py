"""Stochastic rounding of states to float16, element by element as csrc/core/state_rounding.h has it."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_DROPPED_BITS = 13
_MIN_NORMAL = 113 << 23  # bits of 2^-14 in float32
_EXPONENT_SHIFT = 112 << 23
_MAX_HALF = 0x7BFF


def round_state_ref(state: Tensor, position: int) -> Tensor:
    """state [..., H, P, N] float32 after `position` tokens -> the same in float16."""
    elements = torch.arange(state[..., :, :, :].shape[-3:].numel()).view(state.shape[-3:])
    return _round(state.float(), state_random_bits(elements, position))


def state_random_bits(elements: Tensor, position: int) -> Tensor:
    """13 bits for each element of a slot, by its place in [H, P, N]."""
    key = _mix(torch.tensor((position + 0x9E3779B9) & _WORD))
    pairs = _mix((elements // 2 + key) & _WORD)
    return torch.where(elements % 2 == 0, pairs, pairs >> 16) & ((1 << _DROPPED_BITS) - 1)


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def _round(values: Tensor, random: Tensor) -> Tensor:
    bits = values.contiguous().view(torch.int32).long() & _WORD
    sign, magnitude = bits >> 31 << 15, bits & 0x7FFFFFFF
    beside_min_normal = (values.abs() + 2.0**-14).contiguous().view(torch.int32).long()
    small = (beside_min_normal + random - _MIN_NORMAL) >> _DROPPED_BITS
    large = ((magnitude + random - _EXPONENT_SHIFT) >> _DROPPED_BITS).clamp(max=_MAX_HALF)
    half = sign | torch.where(magnitude < _MIN_NORMAL, small, large)
    rounded = half.to(torch.int32).to(torch.int16).view(torch.float16)
    return torch.where(values.isnan(), torch.full_like(rounded, torch.nan), rounded)
