"""Bits with the prefix cache and without: equal with batch-invariant kernels, close with the fastest ones."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.config import GIB, EngineConfig
from headway.engine.assemble import ledger_settings, model_bytes
from headway.engine.memory import plan_memory
from headway.errors import ConfigError
from headway.llm import LLM
from headway.models.config import ModelConfig
from headway.models.registry import read_model_config
from headway.request import SamplingParams
from tests.engine.driving import prompt_of
from tests.engine.gpu import gpu_llm, tiny_trace
from tests.engine.traces import Arrival, check_same, play

NUM_TRACES = {"cpu": 3, "cuda": 12}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
NUM_SHARED = (64, 100, 150, 192, 230, 300)
MAX_KL = 1e-3
MAX_PASSED_OVER = 8  # tokens behind a state of an output's stride that are not worth a wait


def family_prompt(length: int, seed: int) -> list[int]:
    """One of three families: a beginning in common, an end of its own."""
    draws = random.Random(seed)
    shared = prompt_of(max(NUM_SHARED), 7 * draws.randrange(3))[: draws.choice(NUM_SHARED)]
    ends = random.Random(191 * seed + length)  # no prompt is another's beginning
    return [*shared, *(ends.randrange(3, 53) for _ in range(1 + length % 90))]


def family_trace(seed: int) -> list[Arrival]:
    return tiny_trace(seed, prompt_of=family_prompt, num_requests=8, max_tokens=12)


@pytest.mark.parametrize("launch_depth", [0, 2])
def test_outcomes_with_the_cache_have_the_bits_of_those_without(
    tiny_model_dir: Path, device: str, launch_depth: int
) -> None:
    """Waypoints lie close, host and device are compared after every step, and free slots hold NaN."""
    settings = {
        "device": device,
        "dtype": DTYPES[device],
        "launch_depth": launch_depth,
        "batch_invariant": True,
        "max_num_seqs": 12,
    }
    traces = [family_trace(seed) for seed in range(NUM_TRACES[device])]
    with gpu_llm(tiny_model_dir, enable_prefix_caching=False, **settings) as llm:
        expected = [play(llm._engine, trace) for trace in traces]
    with gpu_llm(tiny_model_dir, check_mirror=True, snapshot_stride_tokens=128, **settings) as llm:
        for seed, trace in enumerate(traces):
            check_same(expected[seed], play(llm._engine, trace), f"seed {seed}")
        stats = llm.prefix_cache_stats()
        assert llm._engine.ledger.stats().num_evictions == 0
    assert stats["num_hits"] > NUM_TRACES[device]
    assert stats["num_cached_tokens"] > 64 * stats["num_hits"]


def test_invariance_leaves_no_outputs_and_no_short_rests(tiny_model_dir: Path) -> None:
    """What a decode kernel has written, or would compute, is rounded otherwise."""
    prompt = prompt_of(70, 3)
    settings = {"device": "cpu", "dtype": "float32", "batch_invariant": True}
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    with gpu_llm(tiny_model_dir, **settings) as llm:
        answer = llm.generate({"prompt_token_ids": prompt}, params)[0].outputs[0].token_ids
        again = llm.generate({"prompt_token_ids": [*prompt, *answer]}, params)[0]
    assert again.num_cached_tokens == 64


def test_exact_prefixes_end_where_prompts_may_be_cut(tiny_model_dir: Path) -> None:
    """With Mamba layers at the unit, whatever the block; else each block must."""
    hybrid = read_model_config(tiny_model_dir)
    attention_alone = replace(hybrid, mamba=None)

    def unit(model: ModelConfig, **settings: Any) -> int:
        config = EngineConfig(batch_invariant=True, max_model_len=256, **settings)
        sizes = model_bytes(hybrid, config.block_size, torch.bfloat16)
        memory = plan_memory(config, sizes, "cuda", 8 * GIB)
        if model.mamba is None:
            memory = replace(memory, num_slots=0, num_snapshots=0)
        return ledger_settings(config, memory, model, "cuda", torch.bfloat16).prefix_unit_tokens

    assert unit(hybrid, block_size=8) == 64
    assert unit(attention_alone, block_size=32) == 32
    assert unit(attention_alone, block_size=8, enable_prefix_caching=False) == 8
    with pytest.raises(ConfigError, match=r"block_size .* a multiple of 16, where cached prefixes may end"):
        unit(attention_alone, block_size=8)


@pytest.fixture
def plain_gpu_llm(tiny_model_dir: Path) -> Iterator[LLM]:
    settings = {"max_logprobs": 1024, "decode_snapshot_stride_tokens": 64, "snapshot_stride_tokens": 64}
    with gpu_llm(tiny_model_dir, **settings) as llm:
        yield llm


def distribution(llm: LLM, tokens: list[int], *, uses_cache: bool) -> tuple[dict[int, float], int]:
    """Log-probabilities of the 1,024 likeliest next tokens, and how many of the prompt's tokens were found."""
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1024, ignore_eos=True)
    output = llm.generate({"prompt_token_ids": tokens}, params, use_prefix_cache=uses_cache)[0]
    scores = output.outputs[0].logprobs
    assert scores is not None
    return {token: entry.logprob for token, entry in scores[0].items()}, output.num_cached_tokens or 0


def kl_divergence(p: dict[int, float], q: dict[int, float]) -> float:
    """Of q from p over the tokens that both have, and all others as one."""
    common = sorted(p.keys() & q.keys())
    total = sum(math.exp(p[token]) * (p[token] - q[token]) for token in common)
    rest_p, rest_q = (max(1e-12, 1 - sum(math.exp(x[token]) for token in common)) for x in (p, q))
    return total + rest_p * math.log(rest_p / rest_q)


def divergence(llm: LLM, tokens: list[int]) -> tuple[float, int]:
    """KL in nats of the next token's distribution with what the cache has from that without, and what it had."""
    found, num_cached = distribution(llm, tokens, uses_cache=True)
    computed, _ = distribution(llm, tokens, uses_cache=False)
    return kl_divergence(computed, found), num_cached


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_what_decoding_left_is_close_to_what_a_prompt_computes(plain_gpu_llm: LLM) -> None:
    """Turns of conversations, which begin in states that decode kernels have written, and forks in their answers."""
    llm, worst, num_found = plain_gpu_llm, 0.0, 0
    params = SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True)
    for seed in range(6):
        tokens = list(prompt_of(120, seed))
        for turn in range(2):
            answer = llm.generate({"prompt_token_ids": tokens}, params)[0].outputs[0].token_ids
            fork = [*tokens, *answer[:75], *prompt_of(12, 50 + turn)]
            tokens = [*tokens, *answer, *prompt_of(20, 90 + turn)]
            for prompt in (fork, tokens):
                kl, num_cached = divergence(llm, prompt)
                worst = max(worst, kl)
                num_found += num_cached > 120
    print(f"largest KL divergence {worst:.2e} nats over {num_found} cached prompts")
    assert num_found >= 20
    assert worst < MAX_KL


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_ends_by_stop_strings_are_as_close_as_those_by_length(plain_gpu_llm: LLM) -> None:
    """A step beyond each is in flight by then: its state goes back over the log, to where a length ends it."""
    llm = plain_gpu_llm
    free = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    divergences: dict[str, list[float]] = {"stop": [], "length": []}
    for seed in range(12):
        prompt = {"prompt_token_ids": list(prompt_of(100 + seed, seed))}
        text = llm.generate(prompt, free, use_prefix_cache=False)[0].outputs[0].text
        stopped = replace(free, stop=[text[len(text) // 2 :][:3]])
        num_tokens = 0
        for reason in divergences:  # in this order: the length is that at which the stop string ended
            llm.reset_prefix_cache()
            params = stopped if reason == "stop" else replace(free, max_tokens=num_tokens)
            answer = llm.generate(prompt, params)[0].outputs[0]
            assert answer.finish_reason == reason
            num_tokens = len(answer.token_ids)
            said = [*prompt["prompt_token_ids"], *answer.token_ids]
            kl, num_cached = divergence(llm, [*said, *prompt_of(20, 90 + seed)])
            assert num_cached >= len(said) - MAX_PASSED_OVER
            divergences[reason].append(kl)
    print({reason: f"largest KL divergence {max(found):.2e} nats" for reason, found in divergences.items()})
    assert max(max(found) for found in divergences.values()) < MAX_KL


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_shared_prefixes_are_close_to_what_a_prompt_computes(plain_gpu_llm: LLM) -> None:
    """Random prompts of three families, with rests of 1 to 90 tokens behind what they share."""
    outcomes = [divergence(plain_gpu_llm, family_prompt(17 * seed, seed)) for seed in range(48)]
    worst = max(kl for kl, _ in outcomes)
    print(f"largest KL divergence {worst:.2e} nats")
    assert sum(num_cached >= 64 for _, num_cached in outcomes) >= 30
    assert worst < MAX_KL
