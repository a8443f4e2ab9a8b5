"""Rehearsed prompts leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import torch

from headway.engine.rehearsal import prompt_sizes, rehearse_prompts
from headway.llm import LLM
from headway.request import SamplingParams
from tests.engine.driving import prompt_of


def test_sizes_go_up_to_the_longest() -> None:
    assert prompt_sizes(1) == (1,)
    assert prompt_sizes(64) == (2, 16, 64)
    assert prompt_sizes(100) == (2, 16, 64, 100)


def test_a_rehearsal_touches_the_dummies_alone_and_cleans_them(tiny_model_dir: Path, device: str) -> None:
    settings = {"device": device, "dtype": "float32", "max_num_seqs": 4, "max_model_len": 128}
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(tiny_model_dir, **settings) as llm:
        expected = llm.generate([prompt_of(70)], params)[0].outputs[0].token_ids
    with LLM(tiny_model_dir, check_mirror=True, **settings) as llm, torch.inference_mode():
        runner = llm._engine._runner
        caches, sizes = runner._caches, []

        def compute(batch: object) -> None:
            sizes.append(batch.num_tokens)
            runner._compute(batch)
            assert any(bool(state[0].any()) for state in caches.ssm_state)

        synchronize = runner.staging.synchronize
        runner.staging.run(rehearse_prompts, runner._buffers, caches, compute, 100, synchronize)
        assert sizes[:2] == [2, 16]
        for cache in (*caches.conv_state, *caches.ssm_state, *caches.keys, *caches.values):
            assert not cache.any()
        assert llm.generate([prompt_of(70)], params)[0].outputs[0].token_ids == expected
