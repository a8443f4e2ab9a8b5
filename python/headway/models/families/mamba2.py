"""Mamba-2 without attention, as transformers stores it (`Mamba2ForCausalLM`).

`residual_in_fp32` is accepted: the residual stream here has the dtype the model is served in, so serve in float32 to
reproduce it exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

from headway.models.config import LayerKind, MambaConfig, ModelConfig
from headway.models.families.common import read_outer
from headway.models.families.family import Family, layer_pieces, outer_pieces
from headway.models.hf import HfConfig
from headway.models.pieces import MlpNames, Piece

# A recurrent model has no longest position of its own; the engine's limit is what bounds a sequence.
_MAX_POSITION = 1 << 20


def _read_config(hf: HfConfig) -> ModelConfig:
    hf.accept_only("hidden_act", "silu", "swish")
    all_mamba: tuple[LayerKind, ...] = ("mamba",)
    dt_min, dt_max = hf.limits("time_step_limit")
    return ModelConfig(
        family="mamba2",
        layers=all_mamba * hf.count("num_hidden_layers"),
        norm_eps=hf.number("layer_norm_epsilon", default=1e-5),
        max_position=hf.integer("max_position_embeddings", default=_MAX_POSITION),
        mamba=MambaConfig(
            num_heads=hf.integer("num_heads"),
            head_dim=hf.integer("head_dim"),
            num_groups=hf.integer("n_groups", default=8),
            state_size=hf.integer("state_size", default=128),
            conv_width=hf.integer("conv_kernel", default=4),
            conv_bias=hf.flag("use_conv_bias", default=True),
            proj_bias=hf.flag("use_bias", default=False),
            dt_min=dt_min,
            dt_max=dt_max,
        ),
        **read_outer(hf),
    )


def _pieces(config: ModelConfig, prefix: str) -> Iterator[Piece]:
    yield from outer_pieces(config, f"{prefix}.embeddings", f"{prefix}.norm_f")
    for layer_idx, kind in enumerate(config.layers):
        source, target = f"{prefix}.layers.{layer_idx}", f"layers.{layer_idx}"
        yield Piece(f"{source}.norm.weight", (config.hidden_size,), f"{target}.norm")
        yield from layer_pieces(config, kind, f"{source}.mixer", target, MlpNames((), ""), None)


MAMBA2 = Family("mamba2", "Mamba2ForCausalLM", _read_config, _pieces, prefixes=("backbone",))
