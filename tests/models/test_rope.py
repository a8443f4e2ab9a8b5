"""Rotary tables against transformers' own frequencies, for every scaling kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headway.layers.rope import cos_sin_table, rope_frequencies
from headway.models.config import ModelConfig, RopeConfig
from headway.models.registry import config_from_dict

transformers = pytest.importorskip("transformers")
HEAD_DIM = 32
BASE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
DIVISORS = {
    "short_factor": [1.0 + i / 16 for i in range(16)],
    "long_factor": [2.0 + i / 4 for i in range(16)],
}
KINDS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 5e3,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        "rope_theta": 1e4,
    },
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "original_max_position_embeddings": 32},
    {"rope_type": "longrope", "original_max_position_embeddings": 32, "rope_theta": 1e4, **DIVISORS},
    {"rope_type": "longrope", "factor": 4.0, "attention_factor": 1.2, **DIVISORS},
]


def read_rope(config: ModelConfig) -> RopeConfig:
    assert config.attention is not None
    assert config.attention.rope is not None
    return config.attention.rope


@pytest.mark.parametrize("num_positions", [24, 128, 300])
@pytest.mark.parametrize("parameters", KINDS, ids=lambda kind: "-".join(map(str, list(kind.values())[:2])))
def test_frequencies_equal_transformers(parameters: dict[str, Any], num_positions: int) -> None:
    reference = transformers.LlamaConfig(**BASE, rope_parameters=dict(parameters))
    rope = read_rope(config_from_dict({**BASE, "model_type": "llama", "rope_parameters": parameters}))
    kind = parameters["rope_type"]
    if kind == "default":
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(reference)
        expected, scale = rotary.inv_freq, rotary.attention_scaling
    else:
        init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind]
        expected, scale = init(reference, torch.device("cpu"), seq_len=num_positions)
    actual = rope_frequencies(rope, num_positions)
    torch.testing.assert_close(actual.inv_freq, expected, rtol=1e-6, atol=0.0)
    assert actual.scale == pytest.approx(scale, rel=1e-6)


def test_table_holds_cosines_then_sines_of_the_rotated_channels() -> None:
    rope = RopeConfig(theta=100.0, rotary_dim=4)
    table = cos_sin_table(rope, 5, torch.device("cpu"))
    angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.1])
    torch.testing.assert_close(table, torch.cat((angles.cos(), angles.sin()), dim=1))


def test_partial_rotation_is_read_from_either_place() -> None:
    outside = config_from_dict({**BASE, "model_type": "llama", "partial_rotary_factor": 0.25})
    inside = config_from_dict(
        {**BASE, "model_type": "llama", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}
    )
    assert read_rope(outside).rotary_dim == read_rope(inside).rotary_dim == HEAD_DIM // 4
