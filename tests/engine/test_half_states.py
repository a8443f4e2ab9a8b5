"""Engines that keep Mamba states as float16: half the memory, the same tokens however rows and prompts are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headway.config import EngineConfig
from headway.engine.assemble import assemble, model_bytes
from headway.errors import ConfigError
from headway.llm import LLM
from headway.models.registry import read_model_config
from headway.ops.state_log import StateWindow
from headway.request import SamplingParams

PROMPTS = ["def fib(n):", "import os\n", "x = 1\n" * 24, "class Stack:\n    def push"]
SAMPLED = SamplingParams(temperature=0.8, seed=3, max_tokens=40, logprobs=1)


def completions(model: Path, device: str, **settings: object) -> list[tuple[object, object]]:
    settings = {"mamba_ssm_cache_dtype": "float16", "max_num_seqs": 2, **settings}
    with LLM(model, device=device, dtype="float32", max_model_len=256, **settings) as llm:
        outputs = [request.outputs[0] for request in llm.generate(PROMPTS, SAMPLED)]
    return [(output.token_ids, output.logprobs) for output in outputs]


def test_no_bit_depends_on_cuts_windows_batch_mates_depth_or_cached_prefixes(tiny_model_dir):
    expected = completions(tiny_model_dir, "cpu", state_window=0)
    assert expected != completions(tiny_model_dir, "cpu", mamba_ssm_cache_dtype="float32")
    for settings in (
        {"max_num_batched_tokens": 17},
        {"state_window": 16, "launch_depth": 2},
        {"max_num_seqs": 4},
        {"enable_prefix_caching": True, "state_window": 16},
    ):
        assert completions(tiny_model_dir, "cpu", **settings) == expected, settings


@pytest.mark.gpu
def test_the_launch_depth_changes_no_token_on_a_gpu(tiny_model_dir):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    runs = [completions(tiny_model_dir, "cuda", max_num_seqs=1, launch_depth=depth) for depth in (0, 1, 2)]
    tokens = [[ids for ids, _ in run] for run in runs]
    assert tokens[0] == tokens[1] == tokens[2]


def test_states_take_half_the_memory(tiny_model_dir):
    config = read_model_config(tiny_model_dir)
    assert config.mamba is not None
    state_elements = config.count("mamba") * config.mamba.d_inner * config.mamba.state_size
    for window in (StateWindow(), StateWindow(16, 3)):
        wide = model_bytes(config, 16, torch.bfloat16, window)
        half = model_bytes(config, 16, torch.bfloat16, window, torch.float16)
        assert wide.per_slot - half.per_slot == 2 * state_elements
    settings = {"model": str(tiny_model_dir), "device": "cpu", "max_num_seqs": 2, "max_model_len": 256}
    planned = {}
    for name in ("float32", "float16"):
        assembly = assemble(EngineConfig(mamba_ssm_cache_dtype=name, enable_prefix_caching=False, **settings))
        assembly.engine.close()
        num_slots = assembly.memory.num_slots + assembly.memory.num_snapshots + 1
        planned[name] = assembly.memory.total_bytes
    assert planned["float32"] - planned["float16"] == 2 * state_elements * num_slots


def test_other_dtypes_are_refused():
    with pytest.raises(
        ConfigError, match=r"mamba_ssm_cache_dtype .* must be one of float32, float16, got 'bfloat16'"
    ):
        EngineConfig(mamba_ssm_cache_dtype="bfloat16")
