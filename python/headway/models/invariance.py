"""Batch invariance: a token's results do not depend on the tokens beside it. Says where that cannot be had."""

from __future__ import annotations

import torch

from headway.layers.linear import supports_invariance
from headway.models.config import ModelConfig
from headway.models.hybrid import model_specs

PIECE_COLUMNS = 8  # 16 bytes of 16-bit elements


def why_variant(model: ModelConfig, device_type: str, dtype: torch.dtype) -> str:
    """What the model lacks a kernel for, whose results are the same in any batch; empty: nothing."""
    if not supports_invariance(device_type, dtype):
        name = str(dtype).removeprefix("torch.")
        return f"{name} on {device_type} (bfloat16 and float16 on cuda, float32 on an x86 cpu)"
    if device_type == "cpu":
        return ""
    odd = [name for name, spec in model_specs(model).items() if spec.is_odd_matrix(PIECE_COLUMNS)]
    return f"matrices whose rows are no multiple of {PIECE_COLUMNS} columns: {odd[0]}" if odd else ""
