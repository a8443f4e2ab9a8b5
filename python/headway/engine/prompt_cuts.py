"""Where a prompt may be cut into steps without changing a bit of its results, by device and model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headway.models.config import ModelConfig
from headway.ops.attention import min_prompt_queries
from headway.ops.mamba import scan_grid_tokens

ATTENTION_GRID_TOKENS = 16  # no piece between two cuts is shorter than min_prompt_queries


@dataclass(frozen=True)
class PromptCuts:
    grid_tokens: int  # cuts fall on absolute multiples of it
    min_last_tokens: int  # that a cut leaves

    @property
    def min_step_tokens(self) -> int:
        """Of a step's budget: the longest piece that must not be cut."""
        return self.grid_tokens + self.min_last_tokens - 1


def prompt_cuts(model: ModelConfig, device_type: str, dtype: torch.dtype) -> PromptCuts:
    grid_tokens = scan_grid_tokens(device_type, dtype) if model.mamba else 1
    min_last_tokens = min_prompt_queries(device_type, dtype) if model.attention else 1
    if min_last_tokens > grid_tokens:
        grid_tokens = ATTENTION_GRID_TOKENS
    return PromptCuts(grid_tokens, min_last_tokens)
