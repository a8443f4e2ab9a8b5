"""Small random checkpoints of every family, made and saved by transformers."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCAB = 131
# dt that transformers' prefill and decode and the published formula compute alike: a lower clamp that nothing reaches.
_NO_CLAMP = {"time_step_min": 1e-9}
_OUTER = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Case:
    """One checkpoint: the transformers class and its settings."""

    name: str
    config_class: str
    settings: dict[str, Any]


def _nemotron(name: str, pattern: str, **settings: Any) -> Case:
    shared = {
        **_OUTER,
        **_ATTENTION,
        **_NO_CLAMP,
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "head_dim": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 24,
        "n_groups": 2,
        "ssm_state_size": 16,
        "intermediate_size": 72,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 56,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
    }
    return Case(name, "NemotronHConfig", shared | settings)


_MAMBA_BLOCK = {
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}
_GRANITE = {
    **_OUTER,
    **_ATTENTION,
    **_MAMBA_BLOCK,
    "num_hidden_layers": 3,
    "layer_types": ["mamba", "attention", "mamba"],
    "intermediate_size": 40,
    "shared_intermediate_size": 56,
    "num_experts_per_tok": 3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 1.7,
}
_MAMBA2 = {**_OUTER, "num_hidden_layers": 3, "num_heads": 6, "head_dim": 16, "state_size": 16}

CASES = (
    _nemotron("nemotron_h", "M*-EM"),
    _nemotron(
        "nemotron_h_groups",
        "ME*E",
        n_group=4,
        topk_group=2,
        num_experts_per_tok=2,
        use_bias=True,
        mamba_proj_bias=True,
    ),
    _nemotron("nemotron_h_latent", "EM*E", moe_latent_size=24, norm_topk_prob=False),
    _nemotron("nemotron_h_dense", "M-*-M", mlp_bias=True, use_conv_bias=False),
    Case(
        "bamba",
        "BambaConfig",
        {
            **_OUTER,
            **_ATTENTION,
            **_MAMBA_BLOCK,
            "num_hidden_layers": 3,
            "attn_layer_indices": [1],
            "intermediate_size": 72,
            "mlp_bias": True,
        },
    ),
    Case(
        "granite_moe",
        "GraniteMoeHybridConfig",
        {**_GRANITE, "num_local_experts": 6, "tie_word_embeddings": True},
    ),
    Case(
        "granite_micro",
        "GraniteMoeHybridConfig",
        {**_GRANITE, "num_local_experts": 0, "position_embedding_type": "rope", "attention_bias": True},
    ),
    Case("mamba2", "Mamba2Config", {**_MAMBA2, "n_groups": 1, "tie_word_embeddings": True}),
    Case("mamba2_groups", "Mamba2Config", {**_MAMBA2, "n_groups": 2, "use_bias": True}),
    Case(
        "llama",
        "LlamaConfig",
        {
            **_OUTER,
            **_ATTENTION,
            "num_hidden_layers": 2,
            "intermediate_size": 72,
            "attention_bias": True,
            "rope_theta": 5e5,
        },
    ),
    Case(
        "qwen3",
        "Qwen3Config",
        {
            **_OUTER,
            **_ATTENTION,
            "num_hidden_layers": 2,
            "intermediate_size": 72,
            "head_dim": 24,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "qwen3_moe",
        "Qwen3MoeConfig",
        {
            **_OUTER,
            **_ATTENTION,
            "num_hidden_layers": 3,
            "intermediate_size": 72,
            "head_dim": 24,
            "moe_intermediate_size": 40,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "mlp_only_layers": [1],
        },
    ),
    Case(
        "mixtral",
        "MixtralConfig",
        {
            **_OUTER,
            **_ATTENTION,
            "num_hidden_layers": 2,
            "intermediate_size": 40,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
        },
    ),
)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def make_model(case: Case, seed: int = 0) -> Any:
    """A transformers model with weights that make every part of it matter; skips where its class is missing."""
    config_class = getattr(transformers, case.config_class, None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {case.config_class}")
    if case.name == "mamba2_groups" and not _normalises_mamba2_by_group():
        pytest.skip(f"transformers {transformers.__version__} normalises all groups of Mamba-2 as one")
    model = transformers.AutoModelForCausalLM.from_config(config_class(**case.settings), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            _draw(name, tensor, generator)
    return model.eval()


def save_model(case: Case, folder: Path, **options: Any) -> Any:
    model = make_model(case)
    model.save_pretrained(folder, **options)
    return model


def _normalises_mamba2_by_group() -> bool:
    """As the published Mamba-2 does, and transformers only since some version between 5.17 and 5.23."""
    norm = transformers.models.mamba2.modeling_mamba2.MambaRMSNormGated
    return "group_size" in inspect.signature(norm.__init__).parameters


def _draw(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Matrices keep the variance of their input; vectors (norms, biases, D) are near one."""
    if name.endswith("A_log"):
        tensor.uniform_(0.0, math.log(8.0), generator=generator)
    elif name.endswith("dt_bias"):
        tensor.uniform_(-4.0, 0.0, generator=generator)
    elif name.endswith("e_score_correction_bias"):
        tensor.normal_(0.0, 0.2, generator=generator)
    elif tensor.dim() >= 2:
        tensor.normal_(0.0, 1.0 / math.sqrt(tensor.shape[-1]), generator=generator)
    elif not name.endswith("inv_freq"):
        tensor.normal_(0.8, 0.2, generator=generator)
