"""Activations of a step, allocated once: every layer of a kind writes to the same buffers, step after step.

This spares the allocator and the slicing at every layer, and gives a captured graph fixed addresses. What a buffer
holds is valid until the next layer of the same kind runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# (name, columns, dtype or None for the model's) -> [T, columns], contiguous
Take = Callable[[str, int, torch.dtype | None], torch.Tensor]


class Arena:
    """Named buffers of `max_tokens` rows; a step of T tokens takes their first T rows."""

    def __init__(self, max_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.max_tokens = max_tokens
        self._dtype = dtype
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, num_tokens: int) -> Take:
        """Hands out [T, columns] buffers; a step longer than max_tokens gets memory of its own."""

        def take_rows(name: str, columns: int, dtype: torch.dtype | None = None) -> torch.Tensor:
            dtype = dtype or self._dtype
            if num_tokens > self.max_tokens:
                return torch.empty(num_tokens, columns, dtype=dtype, device=self._device)
            if name not in self._buffers:
                self._buffers[name] = torch.empty(self.max_tokens, columns, dtype=dtype, device=self._device)
            return self._buffers[name][:num_tokens]

        return take_rows
