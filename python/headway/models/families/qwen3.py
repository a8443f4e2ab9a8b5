"""Qwen3 and Qwen3-MoE: attention with normalised queries and keys, then a gated MLP or experts."""

from __future__ import annotations

from collections.abc import Iterator

from headway.errors import ModelLoadError
from headway.models.config import AttentionConfig, LayerKind, MlpConfig, ModelConfig, MoeConfig
from headway.models.families.common import read_attention, read_outer
from headway.models.families.family import BlockNames, Family, block_pieces, mixer_kinds, two_layer_blocks
from headway.models.hf import HfConfig
from headway.models.pieces import MoeNames, Piece

_MOE_NAMES = BlockNames(
    moe=MoeNames(
        router="mlp.gate.weight",
        expert_inputs=("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
        expert_output="mlp.experts.{e}.down_proj.weight",
    )
)


def _read_dense(hf: HfConfig) -> ModelConfig:
    num_blocks = hf.count("num_hidden_layers")
    return _read_config(hf, "qwen3", ["mlp"] * num_blocks)


def _read_moe(hf: HfConfig) -> ModelConfig:
    """Experts in every `decoder_sparse_step`-th block that `mlp_only_layers` does not name."""
    step = hf.integer("decoder_sparse_step", default=1)
    dense = hf.values.get("mlp_only_layers") or []
    if step == 0 or not isinstance(dense, list):
        raise ModelLoadError("config.json: decoder_sparse_step must be at least 1 and mlp_only_layers a list")
    num_blocks = hf.count("num_hidden_layers")
    kinds: list[LayerKind] = [
        "mlp" if block in dense or (block + 1) % step else "moe" for block in range(num_blocks)
    ]
    return _read_config(hf, "qwen3_moe", kinds)


def _read_config(hf: HfConfig, family: str, feed_forward: list[LayerKind]) -> ModelConfig:
    max_position = hf.integer("max_position_embeddings", default=32768)
    hf.refuse_sliding_window(max_position=max_position)
    return ModelConfig(
        family=family,
        layers=two_layer_blocks(["attention"] * len(feed_forward), feed_forward),
        norm_eps=hf.number("rms_norm_eps", default=1e-6),
        max_position=max_position,
        attention=_read_attention(hf, len(feed_forward)),
        mlp=_mlp_config(hf) if "mlp" in feed_forward else None,
        moe=_moe_config(hf) if "moe" in feed_forward else None,
        **read_outer(hf),
    )


def _read_attention(hf: HfConfig, num_blocks: int) -> AttentionConfig:
    mixer_kinds(hf, num_blocks)
    return read_attention(hf, bias=hf.flag("attention_bias", default=False), has_qk_norm=True)


def _mlp_config(hf: HfConfig) -> MlpConfig:
    width = hf.integer("intermediate_size")
    return MlpConfig(intermediate_size=width, activation=hf.activation("hidden_act"), is_gated=True)


def _moe_config(hf: HfConfig) -> MoeConfig:
    return MoeConfig(
        num_experts=hf.count("num_local_experts", "num_experts", default=128),
        top_k=hf.integer("num_experts_per_tok", default=8),
        intermediate_size=hf.integer("moe_intermediate_size", default=768),
        activation=hf.activation("hidden_act"),
        is_gated=True,
        score="softmax",
        normalise=hf.flag("norm_topk_prob", default=False),
    )


def _dense_pieces(config: ModelConfig, prefix: str) -> Iterator[Piece]:
    return block_pieces(config, prefix, BlockNames())


def _moe_pieces(config: ModelConfig, prefix: str) -> Iterator[Piece]:
    return block_pieces(config, prefix, _MOE_NAMES)


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read_dense, _dense_pieces)
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _read_moe, _moe_pieces)
