"""How a request's tokens are chosen and where they end, over the fake model."""

from __future__ import annotations

import numpy as np
import pytest

from headway.errors import RequestError
from tests.engine.driving import prompt_of, run_dry, submit, tokens_of
from tests.engine.fake_model import EOS, expected_tokens, make_engine, sequence_logits


def test_end_token_and_length() -> None:
    engine = make_engine().engine
    request = submit(engine, prompt_of(5), logit_bias={EOS: 100.0})
    ignoring = submit(engine, prompt_of(5), logit_bias={EOS: 100.0}, ignore_eos=True, max_tokens=4)
    run_dry(engine)
    assert (tokens_of(request), request.completions[0].finish_reason) == ([EOS], "stop")
    assert request.completions[0].stop_reason is None
    assert (tokens_of(ignoring), ignoring.completions[0].finish_reason) == ([EOS] * 4, "length")


def test_stop_token_is_named() -> None:
    engine = make_engine().engine
    stop = expected_tokens(prompt_of(5), 4)[-1]
    request = submit(engine, prompt_of(5), stop_token_ids=[stop])
    run_dry(engine)
    assert tokens_of(request)[-1] == stop
    assert request.completions[0].stop_reason == stop


def test_min_tokens_holds_the_end_back() -> None:
    engine = make_engine().engine
    request = submit(engine, prompt_of(5), min_tokens=6, logit_bias={EOS: 100.0})
    run_dry(engine)
    tokens = tokens_of(request)
    assert len(tokens) == 7
    assert tokens[-1] == EOS
    assert EOS not in tokens[:-1]


def test_output_stops_at_max_model_len() -> None:
    engine = make_engine(max_model_len=20).engine
    request = submit(engine, prompt_of(12), max_tokens=None, ignore_eos=True)
    run_dry(engine)
    assert len(tokens_of(request)) == 8
    assert request.completions[0].finish_reason == "length"


def test_min_tokens_needs_a_token_that_may_come() -> None:
    engine = make_engine().engine
    with pytest.raises(
        RequestError, match="min_tokens must be 0 where allowed_token_ids has end and stop tokens alone"
    ):
        submit(engine, prompt_of(5), min_tokens=2, allowed_token_ids=[EOS, 7], stop_token_ids=[7])
    request = submit(
        engine, prompt_of(5), min_tokens=2, allowed_token_ids=[EOS], ignore_eos=True, max_tokens=3
    )
    run_dry(engine)
    assert tokens_of(request) == [EOS] * 3


def test_logit_bias_forces_a_token() -> None:
    engine = make_engine().engine
    request = submit(engine, prompt_of(5), logit_bias={42: 100.0}, max_tokens=5)
    run_dry(engine)
    assert tokens_of(request) == [42] * 5


def test_presence_penalty_forbids_repeats_of_output() -> None:
    engine = make_engine().engine
    request = submit(
        engine, prompt_of(3), logit_bias={40: 3.0, 41: 2.5}, frequency_penalty=2.0, max_tokens=10
    )
    plain = submit(engine, prompt_of(3), logit_bias={40: 3.0, 41: 2.5}, max_tokens=10)
    run_dry(engine)
    counts = [tokens_of(r).count(40) + tokens_of(r).count(41) for r in (request, plain)]
    assert counts[0] < counts[1]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    engine = make_engine().engine
    request = submit(engine, prompt_of(5), logprobs=3, max_tokens=4, logit_bias={30: 100.0})
    plain = submit(engine, prompt_of(5), max_tokens=4)
    run_dry(engine)
    completion = request.completions[0]
    assert plain.completions[0].logprobs is None
    assert completion.logprobs is not None
    assert len(completion.logprobs) == 4
    sequence = prompt_of(5)
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        logits = sequence_logits(sequence).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        order = np.argsort(-logits, kind="stable")
        assert set(entries) == {token, *order[:3].tolist()}
        assert next(iter(entries)) == token
        for token_id, entry in entries.items():
            assert entry.logprob == pytest.approx(expected[token_id], abs=1e-4)
            assert entry.rank == 1 + int((logits > logits[token_id]).sum())
        sequence.append(token)
    assert completion.cumulative_logprob == pytest.approx(
        sum(entries[t].logprob for t, entries in zip(completion.token_ids, completion.logprobs, strict=True))
    )


def test_zero_logprobs_report_the_chosen_token_alone() -> None:
    engine = make_engine().engine
    request = submit(engine, prompt_of(5), logprobs=0, max_tokens=2)
    run_dry(engine)
    assert [list(entries) for entries in request.completions[0].logprobs or []] == [
        [t] for t in tokens_of(request)
    ]


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    outputs = []
    for companions in (0, 3, 7):
        engine = make_engine(seed=companions).engine
        crowd = [submit(engine, prompt_of(4 + i, i), temperature=1.3) for i in range(companions)]
        request = submit(engine, prompt_of(6), temperature=1.0, seed=1234, max_tokens=16, ignore_eos=True)
        run_dry(engine)
        outputs.append(tokens_of(request))
        assert all(r.is_finished for r in crowd)
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0] != expected_tokens(prompt_of(6), 16, stops_at=None)


def test_unset_seeds_come_from_the_engine() -> None:
    def sample(seed: int) -> list[list[int]]:
        engine = make_engine(seed=seed).engine
        requests = [submit(engine, prompt_of(6), temperature=1.0, ignore_eos=True) for _ in range(2)]
        run_dry(engine)
        return [tokens_of(request) for request in requests]

    assert sample(1) == sample(1) != sample(2)
    assert sample(1)[0] != sample(1)[1]


def test_n_completions_differ_and_the_first_is_that_of_n_1() -> None:
    engine = make_engine().engine
    many = submit(engine, prompt_of(6), temperature=1.0, seed=5, n=4, ignore_eos=True)
    one = submit(engine, prompt_of(6), temperature=1.0, seed=5, ignore_eos=True)
    run_dry(engine)
    outputs = [tuple(tokens_of(many, i)) for i in range(4)]
    assert len(set(outputs)) == 4
    assert outputs[0] == tuple(tokens_of(one))
