"""Llama 2 and 3: blocks of attention with rotary embedding and a gated MLP."""

from __future__ import annotations

from collections.abc import Iterator

from headway.models.config import MlpConfig, ModelConfig
from headway.models.families.common import read_attention, read_outer
from headway.models.families.family import BlockNames, Family, block_pieces, two_layer_blocks
from headway.models.hf import HfConfig
from headway.models.pieces import Piece


def _read_config(hf: HfConfig) -> ModelConfig:
    num_blocks = hf.count("num_hidden_layers")
    return ModelConfig(
        family="llama",
        layers=two_layer_blocks(["attention"] * num_blocks, ["mlp"] * num_blocks),
        norm_eps=hf.number("rms_norm_eps", default=1e-6),
        max_position=hf.integer("max_position_embeddings", default=2048),
        attention=read_attention(hf, bias=hf.flag("attention_bias", default=False)),
        mlp=MlpConfig(
            intermediate_size=hf.integer("intermediate_size"),
            activation=hf.activation("hidden_act"),
            is_gated=True,
            bias=hf.flag("mlp_bias", default=False),
        ),
        **read_outer(hf),
    )


def _pieces(config: ModelConfig, prefix: str) -> Iterator[Piece]:
    return block_pieces(config, prefix, BlockNames())


LLAMA = Family("llama", "LlamaForCausalLM", _read_config, _pieces)
