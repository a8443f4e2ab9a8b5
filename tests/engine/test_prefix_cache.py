"""The prefix cache changes when tokens come, never which: outputs with it are those without it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from headway.errors import RequestError
from headway.llm import LLM
from headway.request import SamplingParams
from tests.engine.driving import prompt_of
from tests.engine.fake_model import Harness, make_engine
from tests.engine.traces import Arrival, check_same, play, random_trace

SETTINGS = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_model_len": 256}


def shared_prompt(num_tokens: int, seed: int) -> Sequence[int]:
    """One of three families of prompts that agree for a while, so that most requests find something."""
    draws = random.Random(seed)
    family = prompt_of(40, draws.randrange(3))
    num_shared = draws.choice([0, 4, 9, 16, 30, 40])
    return [*family[:num_shared], *prompt_of(40, seed + 100)][:num_tokens]


def shared_trace(seed: int) -> list[Arrival]:
    return random_trace(
        seed, prompt_of=shared_prompt, max_prompt_len=40, max_tokens=16, stops=[], num_requests=12
    )


def fake_engine(
    seed: int, launch_depth: int, *, is_cached: bool, forgets_to_restore: bool = False
) -> Harness:
    """Pools that are large, small or too small for two requests, as the seed has it."""
    draws = random.Random(seed)
    sizes = {
        "num_blocks": draws.choice([17, 24, 60]),
        "max_rows": draws.choice([3, 6]),
        "max_step_tokens": draws.choice([6, 13, 64]),
    }
    num_snapshots = draws.choice([1, 3, 12])
    return make_engine(
        **sizes,
        launch_depth=launch_depth,
        num_snapshots=num_snapshots if is_cached else None,
        snapshot_stride_tokens=draws.choice([0, 8]) if is_cached else 0,
        forgets_to_restore=forgets_to_restore,
    )


def check_trace(seed: int) -> int:
    """Returns the hits of all depths."""
    trace, num_hits = shared_trace(seed), 0
    plain = play(fake_engine(seed, 0, is_cached=False).engine, trace)
    for launch_depth in range(4):
        harness = fake_engine(seed, launch_depth, is_cached=True)
        for _ in range(2):  # the second time, the first one's prefixes are there
            check_same(plain, play(harness.engine, trace))
        num_hits += harness.engine.prefix_cache_stats()["num_hits"]
    return num_hits


def test_the_cache_changes_no_outcome_at_any_depth() -> None:
    assert sum(check_trace(seed) for seed in range(6)) > 50


@pytest.mark.long
@pytest.mark.parametrize("block", range(100))
def test_the_cache_changes_no_outcome_over_thousands_of_traces(block: int) -> None:
    assert sum(check_trace(seed) for seed in range(1000 + 100 * block, 1100 + 100 * block)) > 1000


def test_a_state_that_is_not_restored_is_seen() -> None:
    """The control of the tests above: without the restore the very same comparison fails."""
    num_seen = 0
    for seed in range(6):
        trace = shared_trace(seed)
        plain = play(fake_engine(seed, 0, is_cached=False).engine, trace)
        spoilt = fake_engine(seed, 0, is_cached=True, forgets_to_restore=True)
        try:
            for _ in range(2):
                check_same(plain, play(spoilt.engine, trace))
        except AssertionError:
            num_seen += 1
    assert num_seen >= 4


@pytest.fixture(scope="module")
def cached(tiny_model_dir: Path) -> Iterator[LLM]:
    with LLM(tiny_model_dir, max_num_batched_tokens=48, **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path) -> Iterator[LLM]:
    with LLM(tiny_model_dir, max_num_batched_tokens=48, enable_prefix_caching=False, **SETTINGS) as llm:
        yield llm


GREEDY = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, ignore_eos=True)


def conversation(llm: LLM, num_turns: int, **options: object) -> list[tuple[list[int], object, int | None]]:
    """Turns that each begin with all that was said before."""
    tokens, said = list(prompt_of(70, 7)), []
    for turn in range(num_turns):
        output = llm.generate({"prompt_token_ids": tokens}, GREEDY, **options)[0]
        reply = output.outputs[0]
        said.append((reply.token_ids, reply.logprobs, output.num_cached_tokens))
        tokens = [*tokens, *reply.token_ids, *prompt_of(9, turn)]
    return said


def test_the_shipped_model_says_the_same_with_and_without(cached: LLM, plain: LLM) -> None:
    cached.reset_prefix_cache()
    with_cache, without = conversation(cached, 5), conversation(plain, 5)
    assert [turn[:2] for turn in with_cache] == [turn[:2] for turn in without]
    assert with_cache[0][2] == 0
    num_prompt_tokens = [70 + turn * 21 for turn in range(5)]
    for (_, _, num_cached), num_tokens in zip(with_cache[1:], num_prompt_tokens[1:], strict=True):
        assert (
            num_cached == num_tokens - 9 - 1
        )  # all but the new words and the last token of the reply before
    assert {turn[2] for turn in without} == {0}


@pytest.mark.parametrize("seed", range(2))
def test_random_requests_of_the_shipped_model_are_the_same(cached: LLM, plain: LLM, seed: int) -> None:
    trace = random_trace(
        seed, prompt_of=shared_prompt, max_prompt_len=40, max_tokens=12, stops=["e"], num_requests=8
    )
    expected = play(plain._engine, trace)
    for _ in range(2):
        check_same(expected, play(cached._engine, trace))


def test_a_salt_shares_with_its_equals_alone(cached: LLM) -> None:
    cached.reset_prefix_cache()
    prompt = {"prompt_token_ids": list(prompt_of(90, 3))}

    def num_cached(salt: str | None, **options: bool) -> int | None:
        return cached.generate(prompt, GREEDY, cache_salt=salt, **options)[0].num_cached_tokens

    assert num_cached("a") == 0
    assert num_cached("b") == 0
    assert num_cached(None) == 0
    assert num_cached("a", use_prefix_cache=False) == 0
    assert (num_cached("a") or 0) > 0
    cached.reset_prefix_cache()
    assert num_cached("a") == 0


def test_a_request_that_opts_out_leaves_nothing(cached: LLM) -> None:
    cached.reset_prefix_cache()
    prompt = {"prompt_token_ids": list(prompt_of(90, 4))}
    cached.generate(prompt, GREEDY, use_prefix_cache=False)
    assert cached.generate(prompt, GREEDY)[0].num_cached_tokens == 0


def test_every_lookup_is_a_hit_or_a_miss_with_a_reason(cached: LLM) -> None:
    conversation(cached, 3)
    stats = cached.prefix_cache_stats()
    reasons = ("too_short", "pending", "without_snapshot", "other_salt", "without_kv")
    assert stats["num_lookups"] == stats["num_hits"] + sum(stats[f"num_{reason}"] for reason in reasons)


@pytest.mark.parametrize("salt", ["", 3])
def test_a_salt_that_is_no_text_is_refused(cached: LLM, salt: object) -> None:
    with pytest.raises(RequestError, match="cache_salt"):
        cached.generate("x", GREEDY, cache_salt=salt)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["penalties", "bad_words"])
def test_a_cached_prefix_is_part_of_the_history(cached: LLM, plain: LLM, kind: str) -> None:
    """What the row did not compute still counts for its penalties, and for words that begin in the prompt."""
    cached.reset_prefix_cache()
    text = "The old man sat by the sea. The old man sat by the sea. The old man sat by"
    tokens = plain.get_tokenizer().encode(text)[-17:]  # all but the last are found
    prompt = {"prompt_token_ids": tokens}
    first = plain.generate(prompt, GREEDY)[0].outputs[0].token_ids
    changes: dict[str, object] = {"repetition_penalty": 1.7, "presence_penalty": 0.5}
    if kind == "bad_words":
        changes = {"bad_words": [plain.get_tokenizer().decode([*tokens[-4:], first[0]]).strip()]}
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, ignore_eos=True, **changes)
    expected = plain.generate(prompt, params)[0].outputs[0]
    assert expected.token_ids != first
    cached.generate(prompt, GREEDY)
    others = [{"prompt_token_ids": list(prompt_of(90, 60 + i))} for i in range(4)]
    cached.generate(others, GREEDY)  # rows forget the prompt
    output = cached.generate(prompt, params)[0]
    assert output.num_cached_tokens == 16
    assert (output.outputs[0].token_ids, output.outputs[0].logprobs) == (
        expected.token_ids,
        expected.logprobs,
    )
