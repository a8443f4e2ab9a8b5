"""The prefix cache on a GPU: what decode kernels left is close to what a prompt's kernels compute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from headway.llm import LLM
from headway.request import SamplingParams
from tests.engine.driving import prompt_of
from tests.engine.gpu import gpu_llm

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]
MAX_KL = 1e-3


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
                found, num_cached = distribution(llm, prompt, uses_cache=True)
                computed, _ = distribution(llm, prompt, uses_cache=False)
                worst = max(worst, kl_divergence(computed, found))
                num_found += num_cached > 120
    print(f"largest KL divergence {worst:.2e} nats over {num_found} cached prompts")
    assert num_found >= 20
    assert worst < MAX_KL
