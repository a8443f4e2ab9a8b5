"""What a model is, independent of any checkpoint's vocabulary of names.

Every supported model is a stack of pre-norm residual layers of four kinds; a decoder block of attention and MLP is two
of them. A family file in this folder maps a Hugging Face `config.json` to a `ModelConfig` and tensor names to ours.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

LayerKind = Literal["mamba", "attention", "mlp", "moe"]
PATTERN_LETTERS: dict[str, LayerKind] = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


@dataclass(frozen=True)
class MambaConfig:
    """Mamba-2 mixer: H heads of P channels, G groups of N states."""

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    conv_width: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    dt_min: float = 0.0
    dt_max: float = float("inf")
    norm_group_size: int = 0  # channels normalised together; 0 = d_inner / num_groups

    @property
    def d_inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.num_groups * self.state_size

    @property
    def in_proj_dim(self) -> int:
        """Columns of in_proj: z, x, B, C, dt."""
        return self.d_inner + self.conv_dim + self.num_heads


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding; `scaling` is the checkpoint's rope_scaling / rope_parameters dictionary."""

    theta: float
    rotary_dim: int
    scaling: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionConfig:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeConfig | None = None  # None = no position embedding
    qkv_bias: bool = False
    out_bias: bool = False
    has_qk_norm: bool = False  # RMS norm over head_dim of q and k, before rotary


@dataclass(frozen=True)
class MlpConfig:
    intermediate_size: int
    activation: Literal["silu", "relu2", "gelu"]
    is_gated: bool
    bias: bool = False


@dataclass(frozen=True)
class MoeConfig:
    num_experts: int
    top_k: int
    intermediate_size: int
    activation: Literal["silu", "relu2", "gelu"]
    is_gated: bool
    score: Literal["softmax", "sigmoid"]
    normalise: bool
    scale: float = 1.0
    num_groups: int = 1
    topk_group: int = 1
    has_score_bias: bool = False
    shared_intermediate_size: int = 0  # 0 = no shared expert
    latent_size: int = 0  # width the routed experts work in; 0 = hidden_size


@dataclass(frozen=True)
class ModelConfig:
    """One model. Layers of a kind share that kind's settings."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerKind, ...]
    norm_eps: float
    max_position: int
    tie_embeddings: bool
    mamba: MambaConfig | None = None
    attention: AttentionConfig | None = None
    mlp: MlpConfig | None = None
    moe: MoeConfig | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    dtype: str = "bfloat16"  # of the checkpoint
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def count(self, kind: LayerKind) -> int:
        return Counter(self.layers)[kind]
