"""Granite 4.0 hybrids: blocks of a Mamba-2 or attention layer and experts with a shared expert, or an MLP (micro).

Four multipliers scale embeddings, residual branches, attention scores and (as a divisor) logits.
"""

from __future__ import annotations

from collections.abc import Iterator

from headway.models.config import LayerKind, MlpConfig, ModelConfig, MoeConfig
from headway.models.families.common import read_attention, read_block_mamba, read_outer
from headway.models.families.family import (
    BlockNames,
    Family,
    block_pieces,
    mixer_kinds,
    two_layer_blocks,
)
from headway.models.hf import HfConfig
from headway.models.pieces import MlpNames, MoeNames, Piece

_SHARED = MlpNames(("shared_mlp.input_linear",), "shared_mlp.output_linear")
_NAMES = BlockNames(
    mlp=_SHARED,
    moe=MoeNames(
        router="block_sparse_moe.router.layer.weight",
        expert_inputs=("block_sparse_moe.input_linear.weight",),
        expert_output="block_sparse_moe.output_linear.weight",
        shared=_SHARED,
    ),
)


def _read_config(hf: HfConfig) -> ModelConfig:
    hf.accept_only("position_embedding_type", "rope", "nope")
    num_blocks = hf.count("num_hidden_layers")
    all_mamba: list[LayerKind] = ["mamba"] * num_blocks
    mixers = mixer_kinds(hf, num_blocks) or all_mamba
    feed_forward: LayerKind = "moe" if hf.count("num_local_experts", default=8) else "mlp"
    return ModelConfig(
        family="granitemoehybrid",
        layers=two_layer_blocks(mixers, [feed_forward] * num_blocks),
        norm_eps=hf.number("rms_norm_eps", default=1e-6),
        max_position=hf.integer("max_position_embeddings", default=2048),
        mamba=read_block_mamba(hf) if "mamba" in mixers else None,
        attention=read_attention(
            hf,
            1.0 if hf.get("position_embedding_type") == "rope" else None,
            scale=hf.number("attention_multiplier", default=1.0),
            bias=hf.flag("attention_bias", default=False),
        )
        if "attention" in mixers
        else None,
        mlp=_read_mlp(hf) if feed_forward == "mlp" else None,
        moe=_read_moe(hf) if feed_forward == "moe" else None,
        embedding_multiplier=hf.number("embedding_multiplier", default=1.0),
        residual_multiplier=hf.number("residual_multiplier", default=1.0),
        logits_divisor=hf.number("logits_scaling", default=1.0),
        **read_outer(hf),
    )


def _read_mlp(hf: HfConfig) -> MlpConfig:
    width = hf.integer("shared_intermediate_size", default=1024)
    return MlpConfig(intermediate_size=width, activation=hf.activation("hidden_act"), is_gated=True)


def _read_moe(hf: HfConfig) -> MoeConfig:
    return MoeConfig(
        num_experts=hf.count("num_local_experts", default=8),
        top_k=hf.integer("num_experts_per_tok", default=2),
        intermediate_size=hf.integer("intermediate_size"),
        activation=hf.activation("hidden_act"),
        is_gated=True,
        score="softmax",
        normalise=True,  # softmax over the chosen logits is softmax over all, renormalised
        shared_intermediate_size=hf.integer("shared_intermediate_size", default=1024),
    )


def _pieces(config: ModelConfig, prefix: str) -> Iterator[Piece]:
    return block_pieces(config, prefix, _NAMES)


GRANITE_MOE_HYBRID = Family("granitemoehybrid", "GraniteMoeHybridForCausalLM", _read_config, _pieces)
