"""Reading `config.json`: published and newer spellings mean the same, and nothing unsupported slips through."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.errors import ModelLoadError
from headway.models.config import ModelConfig
from headway.models.hybrid import weight_bytes
from headway.models.registry import FAMILIES, config_from_dict, read_model_config
from tests.models.checkpoints import CASES, Case, make_model

SHAPES = Path(__file__).parents[2] / "bench" / "models"

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}


def published(name: str, **changes: Any) -> ModelConfig:
    return config_from_dict(json.loads((SHAPES / f"{name}.json").read_text()) | changes)


def test_published_shape_of_nemotron_nano_9b() -> None:
    config = published("nemotron-nano-9b-v2")
    assert (config.count("mamba"), config.count("attention"), config.count("mlp")) == (27, 4, 25)
    assert config.mamba is not None
    assert (config.mamba.d_inner, config.mamba.conv_dim, config.mamba.in_proj_dim) == (10240, 12288, 22656)
    assert config.attention is not None
    assert config.attention.rope is None
    assert config.mlp is not None
    assert (config.mlp.activation, config.mlp.is_gated) == ("relu2", False)


def test_published_shape_of_nemotron_3_nano() -> None:
    config = published("nemotron-3-nano-30b-a3b")
    assert (config.count("mamba"), config.count("attention"), config.count("moe")) == (23, 6, 23)
    assert config.moe is not None
    assert (config.moe.num_experts, config.moe.top_k, config.moe.shared_intermediate_size) == (128, 6, 3712)
    assert (config.moe.score, config.moe.scale, config.moe.has_score_bias) == ("sigmoid", 2.5, True)


def test_published_shape_of_granite_tiny() -> None:
    config = published("granite-4.0-h-tiny")
    assert [index // 2 for index, kind in enumerate(config.layers) if kind == "attention"] == [5, 15, 25, 35]
    assert (config.embedding_multiplier, config.residual_multiplier, config.logits_divisor) == (12, 0.22, 6)
    assert config.attention is not None
    assert config.attention.scale == 1 / 128
    assert config.tie_embeddings


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_transformers_saves_reads_like_what_it_was_given(case: Case, tmp_path: Path) -> None:
    reference = make_model(case).config
    reference.save_pretrained(tmp_path)
    saved = read_model_config(tmp_path)
    given = config_from_dict(case.settings | {"model_type": reference.model_type, "dtype": saved.dtype})
    assert saved == given


def test_old_and_new_layer_lists_mean_the_same() -> None:
    values = json.loads((SHAPES / "small.json").read_text())
    pattern = values.pop("hybrid_override_pattern")
    old_names = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    new_names = old_names | {"M": "linear_attention", "*": "full_attention"}
    expected = published("small").layers
    for names in (old_names, new_names):
        listed = values | {"layers_block_type": [names[letter] for letter in pattern]}
        assert config_from_dict(listed).layers == expected


def test_old_and_new_rope_settings_mean_the_same() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = config_from_dict(LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | scaling})
    new_settings = {"rope_type": "llama3", "rope_theta": 5e5} | scaling
    assert old == config_from_dict(LLAMA | {"rope_parameters": new_settings})


@pytest.mark.parametrize("high", [math.inf, {"__float__": "Infinity"}])
def test_step_limit_reads_every_spelling_of_infinity(high: object) -> None:
    mamba = published("small", time_step_limit=[0.0, high]).mamba
    assert mamba is not None
    assert (mamba.dt_min, mamba.dt_max) == (0.0, math.inf)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "quantised"]),
        ({"hidden_act": "gelu_pytorch_tanh"}, ["hidden_act", "gelu_pytorch_tanh", "silu"]),
        ({"rope_scaling": {"type": "spiral"}}, ["rope_type", "spiral", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_parameters", "linear", "factor"]),
        ({"rope_scaling": {"type": "linear", "factor": "8"}}, ["factor", "'8'", "number"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 0}}, ["factor", "above 0"]),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            ["list of 8 numbers"],
        ),
        ({"rope_theta": -1.0}, ["rope_theta", "above 0"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'", "integer"]),
        ({"vocab_size": 0}, ["vocab_size", "at least 1"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads = 3", "num_attention_heads = 4"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "at least 1"]),
        ({"intermediate_size": None}, ["lacks 'intermediate_size'"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "'yes'"]),
        ({"architectures": ["RwkvForCausalLM"]}, ["RwkvForCausalLM", *FAMILIES]),
        ({"architectures": None, "model_type": "rwkv"}, ["rwkv", *FAMILIES]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelLoadError) as error:
        config_from_dict(LLAMA | changes)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("small", {"hybrid_override_pattern": "MXM"}, ["hybrid_override_pattern", "'X'"]),
        ("small", {"num_hidden_layers": 3}, ["25 layers", "num_hidden_layers is 3"]),
        ("small", {"conv_kernel": 8}, ["conv_kernel", "8"]),
        ("small", {"n_groups": 5}, ["5 Mamba groups", "32 heads"]),
        ("small", {"mamba_hidden_act": "relu"}, ["mamba_hidden_act", "relu"]),
        ("small", {"mamba_proj_bias": True}, ["mamba_proj_bias", "use_bias"]),
        ("small", {"sliding_window": 128}, ["sliding_window", "128"]),
        ("small", {"time_step_limit": [0.1]}, ["time_step_limit", "[0.1]"]),
        ("nemotron-3-nano-30b-a3b", {"mlp_bias": True}, ["mlp_bias", "experts"]),
        ("nemotron-3-nano-30b-a3b", {"num_experts_per_tok": 200}, ["num_experts_per_tok is 200", "128"]),
        ("granite-4.0-h-tiny", {"position_embedding_type": "alibi"}, ["position_embedding_type", "alibi"]),
        ("granite-4.0-h-tiny", {"layer_types": ["rwkv"] * 40}, ["layer type 'rwkv'"]),
        ("granite-4.0-h-tiny", {"layer_types": ["mamba"]}, ["layer_types", "40 layers"]),
    ],
)
def test_hybrids_refuse_what_they_cannot_compute(
    name: str, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ModelLoadError) as error:
        published(name, **changes)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_window_that_no_sequence_outgrows_is_accepted() -> None:
    assert published("small", sliding_window=131072) == published("small")


def test_a_path_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is not a folder"):
        read_model_config(tmp_path / "missing")
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json is not valid JSON"):
        read_model_config(tmp_path)


def test_reading_a_configuration_needs_no_torch() -> None:
    code = (
        "import sys; from headway.models.registry import read_model_config; "
        f"read_model_config({str(SHAPES / 'small.json')!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


WRONG_VALUES: list[Any] = [
    None,
    -1,
    0,
    1,
    3,
    2.5,
    True,
    "x",
    "",
    [],
    [1, 2],
    ["mamba"],
    {},
    {"a": {}},
    {"__float__": "x"},
    math.nan,
    2**31,  # of layers or experts, which are looked at one by one
    10**400,  # more than a float holds
]


@pytest.mark.parametrize("name", sorted(path.stem for path in SHAPES.glob("*.json")))
def test_any_wrong_value_is_a_named_error_or_harmless(name: str) -> None:
    """No value of any key may end in a traceback, here or when the weights are counted."""
    values = json.loads((SHAPES / f"{name}.json").read_text())
    for key in values:
        for wrong in WRONG_VALUES:
            with suppress(ModelLoadError):
                config = config_from_dict(values | {key: wrong})
                assert weight_bytes(config, torch.bfloat16) > 0
