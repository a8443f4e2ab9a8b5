"""Chooses between Mamba states in place and over windows, once an engine: a slot's log is valid or there is none."""

from __future__ import annotations

import torch

from headway.config import EngineConfig, config_error
from headway.models.config import MambaConfig, ModelConfig
from headway.ops.mamba_decode import is_supported
from headway.ops.state_log import IN_PLACE, WINDOW_TOKENS, StateWindow


def choose_window(
    config: EngineConfig, model: ModelConfig, device_type: str, dtype: torch.dtype, launch_depth: int
) -> StateWindow:
    """How far a model's Mamba states lag behind their rows.

    Raises:
        ConfigError: the window asked for has no kernel on this device for this model.
    """
    if model.mamba is None or config.state_window == 0:
        return IN_PLACE
    if device_type == "cpu":
        if config.state_window is None:
            return IN_PLACE
    elif not _has_kernel(model.mamba, dtype):
        if config.state_window is None:
            return IN_PLACE
        raise config_error("state_window", config.state_window, "0 on a GPU for a mixer of these sizes")
    return StateWindow(config.state_window or WINDOW_TOKENS, config.max_rewind_tokens or max(1, launch_depth))


def _has_kernel(mamba: MambaConfig, dtype: torch.dtype) -> bool:
    return is_supported(
        num_heads=mamba.num_heads,
        head_dim=mamba.head_dim,
        num_groups=mamba.num_groups,
        state_size=mamba.state_size,
        width=mamba.conv_width,
        dtype=dtype,
    )
