"""Nemotron-H, Nemotron Nano 2 and Nemotron 3: one mixer a block, in any pattern of M, *, - and E.

Attention has no position embedding; feed-forward layers are relu2 without a gate; the router scores by sigmoid. The
tensors of the multi-token-prediction head (`mtp.*`) are known and not loaded. dt is clamped to `time_step_limit` only,
as in the published code; transformers' prefill clamps it to `time_step_min` besides, its decode does not.
"""

from __future__ import annotations

from collections.abc import Iterator

from headway.errors import ModelLoadError
from headway.models.config import (
    PATTERN_LETTERS,
    LayerKind,
    MambaConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
)
from headway.models.families.common import read_attention, read_outer
from headway.models.families.family import Family, layer_kind, layer_pieces, outer_pieces
from headway.models.hf import HfConfig
from headway.models.pieces import MlpNames, MoeNames, Piece

_MLP = MlpNames(("up_proj",), "down_proj")
_MOE = MoeNames(
    router="gate.weight",
    score_bias="gate.e_score_correction_bias",
    expert_inputs=("experts.{e}.up_proj.weight",),
    expert_output="experts.{e}.down_proj.weight",
    shared=MlpNames(("shared_experts.up_proj",), "shared_experts.down_proj"),
)


def _read_config(hf: HfConfig) -> ModelConfig:
    max_position = hf.integer("max_position_embeddings", default=4096)
    hf.refuse_sliding_window(max_position=max_position)
    hf.accept_only("residual_in_fp32", False)
    layers = _read_layers(hf)
    return ModelConfig(
        family="nemotron_h",
        layers=layers,
        norm_eps=hf.number("layer_norm_epsilon", "norm_eps", "rms_norm_eps", default=1e-5),
        max_position=max_position,
        mamba=_read_mamba(hf) if "mamba" in layers else None,
        attention=read_attention(hf, None, bias=hf.flag("attention_bias", default=False))
        if "attention" in layers
        else None,
        mlp=_read_mlp(hf) if "mlp" in layers else None,
        moe=_read_moe(hf) if "moe" in layers else None,
        **read_outer(hf),
    )


def _read_layers(hf: HfConfig) -> tuple[LayerKind, ...]:
    listed = hf.get("layers_block_type", "layer_types")
    if isinstance(listed, list):
        return tuple(layer_kind(name) for name in listed)
    pattern = hf.text("hybrid_override_pattern")
    unknown = sorted(set(pattern) - set(PATTERN_LETTERS))
    if unknown:
        raise ModelLoadError(
            f"config.json: hybrid_override_pattern may hold M, *, - and E, got {unknown[0]!r}"
        )
    num_layers = hf.count("num_hidden_layers", default=len(pattern))
    if len(pattern) != num_layers:
        raise ModelLoadError(
            f"config.json: hybrid_override_pattern has {len(pattern)} layers, num_hidden_layers is {num_layers}"
        )
    return tuple(PATTERN_LETTERS[letter] for letter in pattern)


def _read_mamba(hf: HfConfig) -> MambaConfig:
    hf.accept_only("mamba_hidden_act", "silu", "swish")
    has_bias = hf.flag("use_bias", default=False)
    hf.accept_only("mamba_proj_bias", has_bias, why="must agree with use_bias")
    dt_min, dt_max = hf.limits("time_step_limit")
    return MambaConfig(
        num_heads=hf.integer("mamba_num_heads"),
        head_dim=hf.integer("mamba_head_dim"),
        num_groups=hf.integer("n_groups", "mamba_n_groups"),
        state_size=hf.integer("ssm_state_size"),
        conv_width=hf.integer("conv_kernel", default=4),
        conv_bias=hf.flag("use_conv_bias", default=True),
        proj_bias=has_bias,
        dt_min=dt_min,
        dt_max=dt_max,
    )


def _read_mlp(hf: HfConfig) -> MlpConfig:
    return MlpConfig(
        intermediate_size=hf.integer("intermediate_size"),
        activation=hf.activation("mlp_hidden_act", "relu2"),
        is_gated=False,
        bias=hf.flag("mlp_bias", default=False),
    )


def _read_moe(hf: HfConfig) -> MoeConfig:
    hf.accept_only("mlp_bias", False, why="experts with biases are not supported")
    num_shared = hf.integer("n_shared_experts", default=1)
    return MoeConfig(
        num_experts=hf.count("n_routed_experts", "num_local_experts"),
        top_k=hf.integer("num_experts_per_tok"),
        intermediate_size=hf.integer("moe_intermediate_size"),
        activation=hf.activation("mlp_hidden_act", "relu2"),
        is_gated=False,
        score="sigmoid",
        normalise=hf.flag("norm_topk_prob", default=True),
        scale=hf.number("routed_scaling_factor", default=1.0),
        num_groups=hf.integer("n_group", default=1),
        topk_group=hf.integer("topk_group", default=1),
        has_score_bias=True,
        shared_intermediate_size=num_shared * hf.integer("moe_shared_expert_intermediate_size"),
        latent_size=hf.integer("moe_latent_size", default=0),
    )


def _pieces(config: ModelConfig, prefix: str) -> Iterator[Piece]:
    yield from outer_pieces(config, f"{prefix}.embeddings", f"{prefix}.norm_f")
    for layer_idx, kind in enumerate(config.layers):
        source, target = f"{prefix}.layers.{layer_idx}", f"layers.{layer_idx}"
        yield Piece(f"{source}.norm.weight", (config.hidden_size,), f"{target}.norm")
        yield from layer_pieces(config, kind, f"{source}.mixer", target, _MLP, _MOE)


NEMOTRON_H = Family(
    "nemotron_h",
    "NemotronHForCausalLM",
    _read_config,
    _pieces,
    prefixes=("backbone", "model"),
    skipped=("mtp.",),
)
