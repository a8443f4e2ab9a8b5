"""Mixtral: blocks of attention with rotary embedding and softmax-routed gated experts."""

from __future__ import annotations

from collections.abc import Iterator

from headway.models.config import ModelConfig, MoeConfig
from headway.models.families.common import read_attention, read_outer
from headway.models.families.family import BlockNames, Family, block_pieces, two_layer_blocks
from headway.models.hf import HfConfig
from headway.models.pieces import MoeNames, Piece

_NAMES = BlockNames(
    moe=MoeNames(
        router="block_sparse_moe.gate.weight",
        expert_inputs=("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight"),
        expert_output="block_sparse_moe.experts.{e}.w2.weight",
    )
)


def _read_config(hf: HfConfig) -> ModelConfig:
    max_position = hf.integer("max_position_embeddings", default=131072)
    hf.refuse_sliding_window(max_position=max_position)
    num_blocks = hf.count("num_hidden_layers")
    return ModelConfig(
        family="mixtral",
        layers=two_layer_blocks(["attention"] * num_blocks, ["moe"] * num_blocks),
        norm_eps=hf.number("rms_norm_eps", default=1e-5),
        max_position=max_position,
        attention=read_attention(hf, rope_theta=1e6),
        moe=MoeConfig(
            num_experts=hf.count("num_local_experts", "num_experts", default=8),
            top_k=hf.integer("num_experts_per_tok", default=2),
            intermediate_size=hf.integer("intermediate_size"),
            activation=hf.activation("hidden_act"),
            is_gated=True,
            score="softmax",
            normalise=True,
        ),
        **read_outer(hf),
    )


def _pieces(config: ModelConfig, prefix: str) -> Iterator[Piece]:
    return block_pieces(config, prefix, _NAMES)


MIXTRAL = Family("mixtral", "MixtralForCausalLM", _read_config, _pieces)
