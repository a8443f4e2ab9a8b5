"""Prompts are cut where no kernel gives other bits: the choice by device, and on a GPU the bits themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headway.engine.prompt_cuts import PromptCuts, prompt_cuts
from headway.errors import ConfigError
from headway.models.config import ModelConfig
from headway.models.registry import read_model_config
from headway.request import SamplingParams
from tests.engine.driving import prompt_of
from tests.engine.gpu import INVARIANT, MAX_STEP_TOKENS, gpu_llm


@pytest.fixture(scope="module")
def hybrid(tiny_model_dir: Path) -> ModelConfig:
    return read_model_config(tiny_model_dir)


@pytest.mark.parametrize(
    ("device_type", "dtype", "cuts", "attention_alone"),
    [
        ("cpu", torch.bfloat16, PromptCuts(1, 1), PromptCuts(1, 1)),
        ("cuda", torch.float32, PromptCuts(1, 1), PromptCuts(1, 1)),
        ("cuda", torch.bfloat16, PromptCuts(64, 9), PromptCuts(16, 9)),
    ],
)
def test_cuts_follow_the_kernels(
    hybrid: ModelConfig, device_type: str, dtype: torch.dtype, cuts: PromptCuts, attention_alone: PromptCuts
) -> None:
    assert prompt_cuts(hybrid, device_type, dtype) == cuts
    assert prompt_cuts(replace(hybrid, mamba=None), device_type, dtype) == attention_alone
    no_attention = prompt_cuts(replace(hybrid, attention=None), device_type, dtype)
    assert no_attention == PromptCuts(cuts.grid_tokens, 1)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_prompt_has_the_same_bits_however_it_is_cut(tiny_model_dir: Path) -> None:
    """Lengths on both sides of each point of the grid and of the border between the attention kernels."""
    prompts = [prompt_of(length, length) for length in (64, 65, 68, 72, 73, 127, 129, 136, 137, 190)]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=2)
    results = []
    for max_tokens in (MAX_STEP_TOKENS, 72, 100):
        with gpu_llm(tiny_model_dir, max_num_batched_tokens=max_tokens, **INVARIANT) as llm:
            outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
            results.append([(output.token_ids, output.logprobs) for output in outputs])
    assert results[1:] == results[:1] * 2


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_steps_too_small_for_a_piece_are_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens .* at least 72: the kernels"):
        gpu_llm(tiny_model_dir, max_num_batched_tokens=71).__enter__()
