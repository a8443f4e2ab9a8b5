"""The log beside a slot's Mamba-2 state: the state is folded once a window, and the inputs since are kept.

The arithmetic is that of csrc/core/state_base.h. A slot whose state is at `base`, of a row at position p, holds the
SSM state after `base` tokens, the convolution columns before `base`, and in its log what the tokens base .. p - 1
brought: x and B after the convolution, dt as projected, and the last raw columns. Token t lies at index t % entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW_TOKENS = 16  # kMaxWindow of csrc/cuda/state_window.cuh


@dataclass(frozen=True)
class StateWindow:
    """How far a slot's state may lag behind its row."""

    num_tokens: int = 0  # 0: states are kept in place
    max_rewind: int = 0  # positions that a row may go back; at least 1 with a window

    def canonical_base(self, base: int, position: int) -> int:
        """Of the token at position, when the slot's state is at base."""
        return max(base, position // self.num_tokens * self.num_tokens)

    def next_base(self, base: int, start: int, end: int) -> int:
        """Where a decode step of tokens start .. end - 1 leaves the slot's state."""
        if self.num_tokens == 0:
            return end
        kept = end - self.max_rewind
        return base if start <= base or kept <= base else self.canonical_base(base, kept)


IN_PLACE = StateWindow()


@dataclass(frozen=True)
class StateLog:
    """One layer's log, all slots; in the model's dtype."""

    columns: Tensor  # [num_slots, entries, H * P + G * N]
    dt: Tensor  # [num_slots, entries, H]
    raw: Tensor  # [num_slots, raw entries, conv_dim]
    window: StateWindow

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(ring.shape) * ring.itemsize for ring in (self.columns, self.dt, self.raw))

    @staticmethod
    def allocate(
        num_slots: int,
        *,
        d_inner: int,
        group_states: int,
        num_heads: int,
        width: int,
        window: StateWindow,
        max_query_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> StateLog:
        """Zeroed. group_states = G * N; width counts the convolution's taps; rows bring up to max_query_len tokens."""
        entries = log_entries(window, max_query_len, width)

        def zeros(num_entries: int, size: int) -> Tensor:
            return torch.zeros(num_slots, num_entries, size, dtype=dtype, device=device)

        return StateLog(
            columns=zeros(entries.folded, d_inner + group_states),
            dt=zeros(entries.folded, num_heads),
            raw=zeros(entries.raw, d_inner + 2 * group_states),
            window=window,
        )


@dataclass(frozen=True)
class LogEntries:
    """Tokens that a slot's rings hold."""

    folded: int  # inputs of the state
    raw: int  # columns of the convolution


def log_entries(window: StateWindow, max_query_len: int, width: int) -> LogEntries:
    """What no step and no rewind can outrun; see csrc/cuda/mamba_decode.cu."""
    reach = window.max_rewind + max_query_len
    return LogEntries(window.num_tokens + reach, reach + width - 1)


@dataclass(frozen=True)
class MixerWeights:
    """What a mixer's decode step reads and never changes."""

    conv_weight: Tensor  # [W, conv_dim] tap-major
    conv_bias: Tensor | None  # [conv_dim]
    A: Tensor  # [H] float32, negative
    D: Tensor  # [H] float32
    dt_bias: Tensor  # [H] float32
    norm_weight: Tensor  # [H * P]
    norm_eps: float
    norm_group_size: int
    dt_min: float = 0.0
    dt_max: float = float("inf")
