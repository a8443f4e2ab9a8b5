"""Rotary position embedding: the angles of each scaling kind, as one table by absolute position.

The kinds and their constants are those of transformers (modeling_rope_utils.py), so that a checkpoint sees the angles
it was trained with. Where transformers lets the longest sequence of a batch choose the frequencies (dynamic,
longrope), the longest position served chooses here: a token's angles must not depend on its batch mates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from headway.models.config import RopeConfig


@dataclass(frozen=True)
class RopeFrequencies:
    """inv_freq: [rotary_dim / 2] float32; scale multiplies cosines and sines."""

    inv_freq: torch.Tensor
    scale: float = 1.0


def cos_sin_table(rope: RopeConfig, max_position: int, device: torch.device) -> torch.Tensor:
    """[max_position, rotary_dim] float32: a row holds the cosines of its angles, then their sines."""
    frequencies = rope_frequencies(rope, max_position)
    positions = torch.arange(max_position, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies.inv_freq.to(device))
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    return table if frequencies.scale == 1.0 else table.mul_(frequencies.scale)


def rope_frequencies(rope: RopeConfig, max_position: int) -> RopeFrequencies:
    """Frequencies for sequences of up to max_position tokens."""
    return _KINDS[str(rope.scaling.get("rope_type", "default"))](rope, max_position)


def _default(rope: RopeConfig, max_position: int) -> RopeFrequencies:
    return RopeFrequencies(_inverse_powers(rope.theta, rope.rotary_dim))


def _linear(rope: RopeConfig, max_position: int) -> RopeFrequencies:
    return RopeFrequencies(_inverse_powers(rope.theta, rope.rotary_dim) / _number(rope, "factor"))


def _dynamic(rope: RopeConfig, max_position: int) -> RopeFrequencies:
    """NTK-aware: a larger base once sequences are longer than those of training."""
    factor, trained = _number(rope, "factor"), _number(rope, "max_position_embeddings")
    stretch = factor * max(max_position, trained) / trained - (factor - 1.0)
    base = rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
    return RopeFrequencies(_inverse_powers(base, rope.rotary_dim))


def _llama3(rope: RopeConfig, max_position: int) -> RopeFrequencies:
    """Slow angles are divided by factor, fast ones kept, those between blended."""
    factor, trained = _number(rope, "factor"), _number(rope, "original_max_position_embeddings")
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    inv_freq = _inverse_powers(rope.theta, rope.rotary_dim)
    wavelength = 2 * math.pi / inv_freq
    blend = ((trained / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return RopeFrequencies((1 - blend) * inv_freq / factor + blend * inv_freq)


def _yarn(rope: RopeConfig, max_position: int) -> RopeFrequencies:
    """YaRN (Peng et al., 2023): per-channel ramp between interpolation and extrapolation, softmax temperature."""
    factor, trained = _number(rope, "factor"), _number(rope, "original_max_position_embeddings")
    dim, half = rope.rotary_dim, rope.rotary_dim // 2

    def channel_of(num_rotations: float) -> float:
        """Channel that turns num_rotations times over the trained length."""
        return dim * math.log(trained / (num_rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    fast = channel_of(_number(rope, "beta_fast", 32.0))
    slow = channel_of(_number(rope, "beta_slow", 1.0))
    if rope.scaling.get("truncate", True):
        fast, slow = math.floor(fast), math.ceil(slow)
    first, last = max(fast, 0), min(slow, dim - 1)
    span = last - first or 0.001
    interpolated = ((torch.arange(half, dtype=torch.float32) - first) / span).clamp(0.0, 1.0)
    inv_freq = _inverse_powers(rope.theta, dim)
    return RopeFrequencies(
        inv_freq / factor * interpolated + inv_freq * (1 - interpolated), _yarn_scale(rope, factor)
    )


def _yarn_scale(rope: RopeConfig, factor: float) -> float:
    if rope.scaling.get("attention_factor") is not None:
        return _number(rope, "attention_factor")

    def growth(mscale: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.scaling.get("mscale") and rope.scaling.get("mscale_all_dim"):
        return growth(_number(rope, "mscale")) / growth(_number(rope, "mscale_all_dim"))
    return growth(1.0)


def _longrope(rope: RopeConfig, max_position: int) -> RopeFrequencies:
    """LongRoPE (Ding et al., 2024): one learnt divisor a channel, a second set for long sequences."""
    trained = _number(rope, "original_max_position_embeddings")
    divisors = rope.scaling["long_factor" if max_position > trained else "short_factor"]
    inv_freq = _inverse_powers(rope.theta, rope.rotary_dim) / torch.tensor(divisors, dtype=torch.float32)
    if rope.scaling.get("attention_factor") is not None:
        return RopeFrequencies(inv_freq, _number(rope, "attention_factor"))
    factor = _number(rope, "factor", _number(rope, "max_position_embeddings") / trained)
    scale = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return RopeFrequencies(inv_freq, scale)


def _inverse_powers(base: float, rotary_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    return 1.0 / (base**exponents)


def _number(rope: RopeConfig, key: str, default: float | None = None) -> float:
    """A scaling constant; the family's config reader has checked that required ones are there."""
    value = rope.scaling.get(key)
    value = default if value is None else value
    assert isinstance(value, (int, float)), f"rope scaling lacks {key}"
    return float(value)


_KINDS: dict[str, Callable[[RopeConfig, int], RopeFrequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
