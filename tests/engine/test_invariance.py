"""Batch invariance: the bits of a request alone and in any company, and what cannot promise that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.errors import ConfigError
from headway.llm import LLM
from headway.models.invariance import why_variant
from headway.models.registry import read_model_config
from headway.request import SamplingParams
from tests.engine.driving import prompt_of
from tests.engine.gpu import INVARIANT

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


def outputs_of(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    outputs = [result.outputs[0] for result in llm.generate(prompts, params)]
    return [(output.token_ids, output.logprobs) for output in outputs]


def test_a_request_has_the_same_bits_in_any_company(tiny_model_dir: Path, device: str) -> None:
    """Alone, among 19 others, and so with other steps, cuts and buckets; greedy and sampled."""
    lengths = (1, 3, 9, 40, 63, 64, 65, 70, 100, 130, 137, 200, 260, 300, 5, 17, 80, 90, 33, 129)
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    params = [
        SamplingParams(temperature=t % 2, seed=t, max_tokens=8 + t, ignore_eos=True, logprobs=2)
        for t in range(len(prompts))
    ]
    settings = {"device": device, "dtype": DTYPES[device], "max_model_len": 512, **INVARIANT}
    with LLM(tiny_model_dir, max_num_seqs=20, max_num_batched_tokens=600, **settings) as llm:
        together = outputs_of(llm, prompts, params)
        for index in range(0, len(prompts), 3):
            alone = outputs_of(llm, [prompts[index]], [params[index]])
            assert alone == [together[index]], lengths[index]
    with LLM(tiny_model_dir, max_num_seqs=7, max_num_batched_tokens=100, launch_depth=2, **settings) as llm:
        assert outputs_of(llm, prompts, params) == together


@pytest.mark.parametrize(
    ("device_type", "dtype", "lack"),
    [
        ("cpu", torch.bfloat16, "bfloat16 on cpu"),
        ("cuda", torch.float32, "float32 on cuda"),
        ("cuda", torch.float16, ""),
        ("cuda", torch.bfloat16, ""),
    ],
)
def test_what_has_no_kernel_is_known(
    tiny_model_dir: Path, device_type: str, dtype: torch.dtype, lack: str
) -> None:
    model = read_model_config(tiny_model_dir)
    found = why_variant(model, device_type, dtype)
    assert found.startswith(lack)
    assert bool(found) == bool(lack)
    if not lack:
        assert "columns: embedding" in why_variant(replace(model, hidden_size=252), device_type, dtype)


def test_what_has_no_kernel_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch_invariant .* no invariant kernel for bfloat16 on cpu"):
        LLM(tiny_model_dir, device="cpu", dtype="bfloat16", **INVARIANT)
