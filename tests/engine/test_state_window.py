"""Engines that keep Mamba states over windows: the same bits on a CPU, and a setting that is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headway.config import EngineConfig
from headway.engine.state_window import choose_window
from headway.errors import ConfigError
from headway.llm import LLM
from headway.models.config import MambaConfig, ModelConfig
from headway.models.registry import read_model_config
from headway.ops.state_log import IN_PLACE, StateWindow
from headway.request import SamplingParams

PROMPTS = ["def fib(n):", "import os\n", "x = 1\n" * 24, "class Stack:\n    def push"]
SAMPLED = SamplingParams(temperature=0.8, seed=3, max_tokens=40, logprobs=1)


def completions(model: Path, device: str, **settings: int) -> list[tuple[object, object]]:
    """Two rows for four requests: prompts are read while others decode, and slots are used again."""
    with LLM(model, device=device, dtype="float32", max_num_seqs=2, max_model_len=256, **settings) as llm:
        outputs = [request.outputs[0] for request in llm.generate(PROMPTS, SAMPLED)]
    return [(output.token_ids, output.logprobs) for output in outputs]


def test_a_window_changes_no_bit_on_a_cpu(tiny_model_dir):
    expected = completions(tiny_model_dir, "cpu", state_window=0)
    assert completions(tiny_model_dir, "cpu", state_window=16) == expected
    assert (
        completions(tiny_model_dir, "cpu", state_window=16, max_rewind_tokens=5, launch_depth=2) == expected
    )


@pytest.mark.gpu
def test_a_window_samples_the_same_tokens_on_a_gpu(tiny_model_dir):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    expected = [tokens for tokens, _ in completions(tiny_model_dir, "cuda", state_window=0)]
    assert [tokens for tokens, _ in completions(tiny_model_dir, "cuda", state_window=16)] == expected


def model_with(tiny_model_dir: Path, head_dim: int) -> ModelConfig:
    config = read_model_config(tiny_model_dir)
    mamba = MambaConfig(num_heads=8, head_dim=head_dim, num_groups=1, state_size=64)
    return ModelConfig(**{**vars(config), "mamba": mamba})


def test_the_window_is_chosen_by_device_and_sizes(tiny_model_dir):
    def chosen(device: str, head_dim: int, **settings: int) -> StateWindow:
        model = model_with(tiny_model_dir, head_dim)
        return choose_window(EngineConfig(**settings), model, device, torch.bfloat16, 2)

    assert chosen("cpu", 64) == IN_PLACE
    assert chosen("cpu", 20, state_window=16) == StateWindow(16, 2)
    assert chosen("cuda", 64, state_window=0) == IN_PLACE
    assert chosen("cuda", 64, state_window=16, max_rewind_tokens=7) == StateWindow(16, 7)
    assert chosen("cuda", 20) == IN_PLACE
    with pytest.raises(ConfigError, match=r"state_window .* must be 0 on a GPU"):
        chosen("cuda", 20, state_window=16)


def test_windows_of_other_lengths_are_refused():
    with pytest.raises(ConfigError, match=r"state_window .* must be 0 or 16, got 8"):
        EngineConfig(state_window=8)
