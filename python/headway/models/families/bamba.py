"""Bamba: blocks of a Mamba-2 or attention layer and a gated MLP; rotary embedding on half of each head."""

from __future__ import annotations

from collections.abc import Iterator

from headway.errors import ModelLoadError
from headway.models.config import LayerKind, MlpConfig, ModelConfig
from headway.models.families.common import read_attention, read_block_mamba, read_outer
from headway.models.families.family import BlockNames, Family, block_pieces, two_layer_blocks
from headway.models.hf import HfConfig
from headway.models.pieces import MlpNames, Piece

_ROTARY_FRACTION = 0.5
_NAMES = BlockNames(
    mlp=MlpNames(("feed_forward.gate_proj", "feed_forward.up_proj"), "feed_forward.down_proj"),
    ffn_norm="pre_ff_layernorm",
    final_norm="final_layernorm",
)


def _read_config(hf: HfConfig) -> ModelConfig:
    mixers = _mixers(hf)
    mlp = MlpConfig(
        intermediate_size=hf.integer("intermediate_size"),
        activation=hf.activation("hidden_act"),
        is_gated=True,
        bias=hf.flag("mlp_bias", default=False),
    )
    return ModelConfig(
        family="bamba",
        layers=two_layer_blocks(mixers, ["mlp"] * len(mixers)),
        norm_eps=hf.number("rms_norm_eps", default=1e-5),
        max_position=hf.integer("max_position_embeddings", default=262144),
        mamba=read_block_mamba(hf) if "mamba" in mixers else None,
        attention=read_attention(hf, _ROTARY_FRACTION, bias=hf.flag("attention_bias", default=False))
        if "attention" in mixers
        else None,
        mlp=mlp,
        **read_outer(hf),
    )


def _mixers(hf: HfConfig) -> list[LayerKind]:
    indices = hf.values.get("attn_layer_indices") or []
    num_layers = hf.count("num_hidden_layers")
    if not isinstance(indices, list) or any(index not in range(num_layers) for index in indices):
        raise ModelLoadError(
            f"config.json: attn_layer_indices must list layers below {num_layers}, got {indices!r}"
        )
    return ["attention" if index in indices else "mamba" for index in range(num_layers)]


def _pieces(config: ModelConfig, prefix: str) -> Iterator[Piece]:
    return block_pieces(config, prefix, _NAMES)


BAMBA = Family("bamba", "BambaForCausalLM", _read_config, _pieces)
