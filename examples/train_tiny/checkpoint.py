"""Writes the trained model in the nemotron_h checkpoint format, and reads it back. Knows nothing of training.

Tensor names are those of the published Nemotron-3 checkpoints: `backbone.*`, `lm_head.weight`, and `mtp.layers.<i>.*`
for the prediction layer, whose first block also carries enorm, hnorm and eh_proj and whose last final_layernorm.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.train_tiny.model import TinyModel
from examples.train_tiny.settings import SPECIAL_TOKENS, TinyShape

KEPT_IN_FLOAT32 = "e_score_correction_bias"


def _published_names(name: str, tensor: Tensor, shape: TinyShape) -> Iterator[tuple[str, Tensor]]:
    """A parameter of TinyModel under its published name; expert stacks fall apart into one tensor an expert."""
    if name.startswith(("embeddings", "layers", "norm_f")):
        name = f"backbone.{name}"
    elif name.startswith(("mtp.enorm", "mtp.hnorm", "mtp.eh_proj")):
        name = name.replace("mtp.", "mtp.layers.0.")
    elif name.startswith("mtp.final_layernorm"):
        name = name.replace("mtp.", f"mtp.layers.{len(shape.mtp_pattern) - 1}.")
    if not name.endswith(("mixer.up", "mixer.down")):
        yield name, tensor
        return
    stem, kind = name.rsplit(".", 1)
    for idx, expert in enumerate(tensor):
        yield f"{stem}.experts.{idx}.{kind}_proj.weight", expert


def export_weights(model: TinyModel) -> dict[str, Tensor]:
    """All tensors under published names, bfloat16 but for the router's correction bias."""
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for published, part in _published_names(name, tensor, model.shape):
            dtype = torch.float32 if published.endswith(KEPT_IN_FLOAT32) else torch.bfloat16
            out[published] = part.detach().to("cpu", dtype).contiguous()
    return out


def load_weights(model: TinyModel, weights: dict[str, Tensor]) -> None:
    """The inverse of `export_weights`; what rounding to bfloat16 lost stays lost."""
    state = model.state_dict()
    for name, tensor in state.items():
        parts = [weights[n] for n, _ in _published_names(name, tensor, model.shape)]
        joined = torch.stack(parts) if name.endswith(("mixer.up", "mixer.down")) else parts[0]
        state[name] = joined.to(tensor)
    model.load_state_dict(state)


def load_checkpoint(folder: Path, shape: TinyShape) -> TinyModel:
    model = TinyModel(shape)
    load_weights(model, load_file(folder / "model.safetensors"))
    return model.eval()


def _config(shape: TinyShape) -> dict[str, object]:
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": len(shape.pattern),
        "hybrid_override_pattern": shape.pattern,
        "max_position_embeddings": shape.max_position,
        "layer_norm_epsilon": shape.norm_eps,
        "norm_eps": shape.norm_eps,
        "tie_word_embeddings": False,
        "residual_in_fp32": False,
        "rescale_prenorm_residual": True,
        "use_bias": False,
        "use_cache": True,
        "pad_token_id": SPECIAL_TOKENS.index("<|pad|>"),
        "bos_token_id": SPECIAL_TOKENS.index("<|bos|>"),
        "eos_token_id": SPECIAL_TOKENS.index("<|eos|>"),
        **_mamba_config(shape),
        **_attention_config(shape),
        **_mlp_config(shape),
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": shape.mtp_pattern,
    }


def _mamba_config(shape: TinyShape) -> dict[str, object]:
    return {
        "mamba_num_heads": shape.mamba_heads,
        "mamba_head_dim": shape.mamba_head_dim,
        "n_groups": shape.mamba_groups,
        "ssm_state_size": shape.state_size,
        "conv_kernel": shape.conv_width,
        "expand": shape.d_inner // shape.hidden_size,
        "chunk_size": shape.chunk_size,
        "use_conv_bias": True,
        "mamba_proj_bias": False,
        "mamba_hidden_act": "silu",
        "mamba_ssm_cache_dtype": "float32",
        # Some readers clamp dt from below by time_step_min, and only in prefill: far below any softplus value here,
        # so that a whole prompt and a token at a time compute the same thing. The limits themselves are (0, inf).
        "time_step_min": 1e-30,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
    }


def _attention_config(shape: TinyShape) -> dict[str, object]:
    return {
        "num_attention_heads": shape.attention_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def _mlp_config(shape: TinyShape) -> dict[str, object]:
    return {
        "intermediate_size": shape.mlp_size,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "n_routed_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_size,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": shape.shared_expert_size,
        "routed_scaling_factor": shape.routed_scale,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
    }


def _generation_config() -> dict[str, object]:
    end_ids = [SPECIAL_TOKENS.index("<|eos|>"), SPECIAL_TOKENS.index("<|im_end|>")]
    return {
        "bos_token_id": SPECIAL_TOKENS.index("<|bos|>"),
        "eos_token_id": end_ids,
        "pad_token_id": SPECIAL_TOKENS.index("<|pad|>"),
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "repetition_penalty": 1.2,  # so small a model loops without it; the model card has the measurement
    }


def save_checkpoint(model: TinyModel, corpus: Path, out: Path) -> None:
    """A flat folder: weights, configurations and the corpus folder's tokenizer files."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(export_weights(model), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    for name, content in (
        ("config.json", _config(model.shape)),
        ("generation_config.json", _generation_config()),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((corpus / name).read_bytes())
