"""Every field that chooses or reports tokens, against a brute-force reference over the fake model's logits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from headway.engine.completion import Request
from headway.errors import RequestError
from headway.outputs import TokenLogprobs
from headway.request import SamplingParams
from tests.engine.driving import prompt_of, run_dry, submit, tokens_of
from tests.engine.fake_model import EOS, VOCAB_SIZE, make_engine, sequence_logits

ALLOWED = [5, 9, 17, 33, 40]


def chosen(prompt: Sequence[int], num_tokens: int, **fields: Any) -> list[int]:
    """Greedy decoding with nothing but Python."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + num_tokens:
        logits = sequence_logits(tokens).astype(np.float64)
        for token, bias in fields.get("logit_bias", {}).items():
            logits[token] += bias
        allowed = fields.get("allowed_token_ids")
        if allowed is not None:
            logits[[token for token in range(VOCAB_SIZE) if token not in allowed]] = -np.inf
        for word in fields.get("bad_words", []):
            before = word[:-1]
            if tokens[len(tokens) - len(before) :] == before:
                logits[word[-1]] = -np.inf
        if len(tokens) - len(prompt) < fields.get("min_tokens", 0):
            logits[EOS] = -np.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] == EOS and not fields.get("ignore_eos"):
            break
    return tokens[len(prompt) :]


def test_allowed_tokens_are_all_that_is_sampled() -> None:
    engine = make_engine(launch_depth=1).engine
    requests = [submit(engine, prompt_of(5 + i, i), allowed_token_ids=ALLOWED) for i in range(4)]
    sampled = submit(engine, prompt_of(5), allowed_token_ids=ALLOWED, temperature=1.5, max_tokens=30)
    plain = submit(engine, prompt_of(6))
    run_dry(engine)
    for i, request in enumerate(requests):
        assert tokens_of(request) == chosen(prompt_of(5 + i, i), 12, allowed_token_ids=ALLOWED)
    assert set(tokens_of(sampled)) <= set(ALLOWED)
    assert len(set(tokens_of(sampled))) > 1
    assert tokens_of(plain) == chosen(prompt_of(6), 12)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_bad_words_are_never_completed(depth: int) -> None:
    """The words are runs of what greedy decoding gives, one of which begins in the prompt."""
    engine = make_engine(launch_depth=depth).engine
    prompt = prompt_of(6)
    free = chosen(prompt, 12, ignore_eos=True)
    words = [free[2:4], free[5:9], [*prompt[-2:], free[0]], [free[10]], [1, 2, 3]]
    request = submit(engine, prompt, bad_words=words, ignore_eos=True)
    run_dry(engine)
    expected = chosen(prompt, 12, bad_words=words, ignore_eos=True)
    assert tokens_of(request) == expected
    text = ",".join(map(str, [*prompt, *expected]))
    assert not any(",".join(map(str, word)) in text for word in words[:4])


def test_everything_at_once_is_the_same_at_any_depth_in_any_company_and_after_eviction() -> None:
    rng = random.Random(3)
    fields = {
        "logit_bias": {EOS: 3.0, 17: 1.0},
        "bad_words": [[17, 17], [9]],
        "allowed_token_ids": [*ALLOWED, EOS],
        "min_tokens": 4,
    }
    expected = chosen(prompt_of(9), 20, **fields)
    for depth in (0, 1, 2, 3):
        engine = make_engine(launch_depth=depth, max_step_tokens=8, num_blocks=40).engine
        request = submit(engine, prompt_of(9), max_tokens=20, **fields)
        crowd = [submit(engine, prompt_of(4 + i, i), temperature=1.0) for i in range(4)]
        drawn = submit(engine, prompt_of(9), max_tokens=20, temperature=1.0, seed=5, **fields)
        while engine.num_unfinished:
            engine.step()
            engine.ledger.check_integrity()
            if rng.random() < 0.3:
                engine.ledger.evict(request.completions[0].ledger_id)
                engine.ledger.evict(drawn.completions[0].ledger_id)
        assert tokens_of(request) == expected
        assert all(other.is_finished for other in crowd)
        if depth == 0:
            first_drawn = tokens_of(drawn)
        assert tokens_of(drawn) == first_drawn


def assert_logprobs(entries: TokenLogprobs, token: int, logits: np.ndarray, num_top: int) -> None:
    expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    order = np.argsort(-logits, kind="stable")[:num_top]
    assert set(entries) == {token, *order.tolist()}
    assert next(iter(entries)) == token
    for token_id, entry in entries.items():
        assert entry.logprob == pytest.approx(expected[token_id], abs=1e-4)
        assert entry.rank == 1 + int((logits > logits[token_id]).sum())


def assert_prompt_logprobs(request: Request, prompt: Sequence[int], num_top: int) -> None:
    found = request.output().prompt_logprobs
    assert found is not None
    assert len(found) == len(prompt)
    assert found[0] is None
    for position in range(1, len(prompt)):
        entries = found[position]
        assert entries is not None
        assert_logprobs(entries, prompt[position], sequence_logits(prompt[:position]), num_top)


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(("max_step_tokens", "max_scored_tokens"), [(32, 6), (5, 3), (7, 1), (32, 64)])
def test_prompt_logprobs(depth: int, max_step_tokens: int, max_scored_tokens: int) -> None:
    engine = make_engine(
        launch_depth=depth,
        max_rows=4,
        max_step_tokens=max_step_tokens,
        max_scored_tokens=max_scored_tokens,
        has_all_logits=True,
    ).engine
    lengths = (13, 1, 7, 2, 20)
    requests = [submit(engine, prompt_of(n, n), prompt_logprobs=2, max_tokens=3) for n in lengths]
    plain = [submit(engine, prompt_of(n, n), max_tokens=3) for n in lengths]
    run_dry(engine)
    for n, request, other in zip(lengths, requests, plain, strict=True):
        assert_prompt_logprobs(request, prompt_of(n, n), 2)
        assert tokens_of(request) == tokens_of(other)
        assert other.output().prompt_logprobs is None


def test_prompt_logprobs_come_once_however_often_a_prompt_is_recomputed() -> None:
    rng = random.Random(1)
    engine = make_engine(launch_depth=2, max_step_tokens=6, has_all_logits=True).engine
    prompts = [prompt_of(11 + i, i) for i in range(3)]
    requests = [
        submit(engine, p, prompt_logprobs=0, n=2, temperature=1.0, seed=i) for i, p in enumerate(prompts)
    ]
    while engine.num_unfinished:
        engine.step()
        engine.ledger.check_integrity()
        if rng.random() < 0.4:
            engine.ledger.evict(rng.choice(requests).completions[0].ledger_id)
    for prompt, request in zip(prompts, requests, strict=True):
        assert_prompt_logprobs(request, prompt, 0)


def test_bad_prompt_logits_end_their_request_alone() -> None:
    engine = make_engine(has_all_logits=True).engine
    poisoned = submit(engine, [3, 2, 4, 5], prompt_logprobs=1)
    healthy = submit(engine, prompt_of(8), prompt_logprobs=1)
    run_dry(engine)
    assert poisoned.completions[0].finish_reason == "error"
    assert_prompt_logprobs(healthy, prompt_of(8), 1)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_processed_logprobs_are_of_what_is_sampled_from(temperature: float) -> None:
    engine = make_engine(has_processed_logprobs=True).engine
    request = submit(
        engine,
        prompt_of(5),
        logprobs=2,
        temperature=temperature,
        seed=3,
        logit_bias={30: 2.0},
        allowed_token_ids=[3, 4, 30, 31, 50],
        top_k=4,
    )
    run_dry(engine)
    sequence = prompt_of(5)
    for token, entries in zip(tokens_of(request), request.completions[0].logprobs or [], strict=True):
        logits = np.full(VOCAB_SIZE, -np.inf)
        logits[[3, 4, 30, 31, 50]] = sequence_logits(sequence)[[3, 4, 30, 31, 50]]
        logits[30] += 2.0
        assert_logprobs(entries, token, logits / (temperature or 1.0), 2)
        sequence.append(token)


def test_the_end_of_a_prompt_is_kept() -> None:
    engine = make_engine(max_model_len=32).engine
    prompt = prompt_of(60)
    short = submit(engine, prompt, truncate_prompt_tokens=7)
    longest = submit(engine, prompt, truncate_prompt_tokens=-1, max_tokens=None)
    alone = submit(engine, prompt[-7:])
    run_dry(engine)
    assert short.prompt_token_ids == prompt[-7:]
    assert tokens_of(short) == tokens_of(alone)
    assert len(longest.prompt_token_ids) == 31
    with pytest.raises(RequestError, match="max_model_len"):
        submit(engine, prompt)


def test_a_seed_of_minus_one_is_none() -> None:
    assert SamplingParams(seed=-1).seed is None


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": [[]]}, "bad_words"),
        ({"bad_words": [3]}, "bad_words"),
        ({"bad_words": [[3, VOCAB_SIZE]]}, "bad_words"),
        ({"bad_words": [[3] * 1024]}, "bad_words"),
        ({"bad_words": ["text, but there is no tokenizer"]}, "bad_words"),
        ({"prompt_logprobs": 6}, "prompt_logprobs"),
        ({"prompt_logprobs": -2}, "prompt_logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"seed": -2}, "seed"),
        ({"output_kind": "half"}, "output_kind"),
        ({"logits_processors": [print]}, "logits_processors"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_values_out_of_range_are_named(fields: dict[str, Any], parameter: str) -> None:
    engine = make_engine().engine
    with pytest.raises(RequestError) as refused:
        submit(engine, prompt_of(4), **fields)
    assert refused.value.parameter == parameter
    assert engine.num_unfinished == 0
