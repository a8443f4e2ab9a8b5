"""Settings that most families spell alike."""

from __future__ import annotations

from typing import TypedDict

from headway.errors import ModelLoadError
from headway.models.config import AttentionConfig, MambaConfig, RopeConfig
from headway.models.hf import HfConfig


class Outer(TypedDict):
    """Fields of `ModelConfig` that do not depend on the layers."""

    vocab_size: int
    hidden_size: int
    tie_embeddings: bool
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


def read_outer(hf: HfConfig) -> Outer:
    return Outer(
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hf.integer("hidden_size"),
        tie_embeddings=hf.flag("tie_word_embeddings", default=False),
        dtype=hf.text("dtype", "torch_dtype", default="bfloat16"),
        bos_token_id=next(iter(hf.id_list("bos_token_id")), None),
        eos_token_ids=hf.id_list("eos_token_id"),
    )


def read_attention(
    hf: HfConfig,
    rope_fraction: float | None = 1.0,
    *,
    rope_theta: float = 10000.0,
    scale: float | None = None,
    bias: bool = False,
    has_qk_norm: bool = False,
) -> AttentionConfig:
    """Grouped-query attention.

    Defaults for what the checkpoint leaves out: rope_fraction of each head is rotated (None: positions are not
    encoded) with base rope_theta; scores are scaled by 1 / sqrt(D).
    """
    num_heads = hf.size("num_attention_heads")
    num_kv_heads = hf.size("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ModelLoadError(
            f"config.json: num_key_value_heads = {num_kv_heads} must divide num_attention_heads = {num_heads}"
        )
    head_dim = hf.size("head_dim", "attention_head_dim", default=hf.size("hidden_size") // num_heads)
    rope: RopeConfig | None = None
    if rope_fraction is not None:
        rope = hf.rope(head_dim, default_theta=rope_theta, default_fraction=rope_fraction)
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None else scale,
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        has_qk_norm=has_qk_norm,
    )


def read_block_mamba(hf: HfConfig) -> MambaConfig:
    """Mamba-2 settings as Bamba and Granite name them."""
    hf.accept_only("hidden_act", "silu", "swish")
    num_heads = hf.size("mamba_n_heads")
    d_inner = hf.integer("mamba_expand", default=2) * hf.integer("hidden_size")
    head_dim = (
        d_inner // num_heads if hf.get("mamba_d_head") in (None, "auto") else hf.integer("mamba_d_head")
    )
    dt_min, dt_max = hf.limits("time_step_limit")
    return MambaConfig(
        num_heads=num_heads,
        head_dim=head_dim,
        num_groups=hf.integer("mamba_n_groups", default=1),
        state_size=hf.integer("mamba_d_state"),
        conv_width=hf.integer("mamba_d_conv", default=4),
        conv_bias=hf.flag("mamba_conv_bias", default=True),
        proj_bias=hf.flag("mamba_proj_bias", default=False),
        dt_min=dt_min,
        dt_max=dt_max,
    )
