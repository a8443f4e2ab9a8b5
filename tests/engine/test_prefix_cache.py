"""The prefix cache changes when tokens come, never which: outputs with it are those without it."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from headway.errors import EngineDeadError, RequestError
from headway.llm import LLM
from headway.request import SamplingParams
from tests.engine.driving import prompt_of
from tests.engine.fake_model import Harness, make_engine
from tests.engine.test_depth import NUM_SHARDS, STOPS, LetterDetokenizer, record_shard, seeds_of
from tests.engine.traces import Arrival, check_same, play, random_trace, without_rewinds

EVIDENCE = "prefix cache on equals off, fake model, depths 0 to 3"
SETTINGS = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_model_len": 256}


def shared_prompt(num_tokens: int, seed: int) -> Sequence[int]:
    """One of three families of prompts that agree for a while, so that most requests find something."""
    draws = random.Random(seed)
    family = prompt_of(40, draws.randrange(3))
    num_shared = draws.choice([0, 4, 9, 16, 30, 40])
    return [*family[:num_shared], *prompt_of(40, seed + 100)][:num_tokens]


def shared_trace(seed: int) -> list[Arrival]:
    return random_trace(
        seed,
        prompt_of=shared_prompt,
        max_prompt_len=40,
        max_tokens=16,
        stops=STOPS,
        num_requests=12,
        has_rewinds=True,
        has_pauses=True,
    )


def fake_engine(
    seed: int,
    launch_depth: int,
    *,
    is_cached: bool,
    forgets_to_restore: bool = False,
    has_poison: bool = False,
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
        num_waypoints=draws.randrange(num_snapshots + 1) if is_cached else 0,
        snapshot_stride_tokens=draws.choice([0, 8]) if is_cached else 0,
        decode_snapshot_stride_tokens=draws.choice([0, 4]) if is_cached else 0,
        forgets_to_restore=forgets_to_restore,
        has_poison=has_poison,
        make_detokenizer=lambda ids, skip: LetterDetokenizer(),
    )


def check_trace(seed: int, launch_depths: Sequence[int]) -> Counter[str]:
    """Cache on against cache off; returns what was reached.

    The model itself checks that a row that starts behind its prompt's beginning reads a state of exactly so many
    tokens, so that no start is ever beyond a snapshot. Every other seed fills free slots with NaN.
    """
    trace, reached = shared_trace(seed), Counter({"traces": 1})
    plain = play(fake_engine(seed, 0, is_cached=False).engine, without_rewinds(trace))
    for launch_depth in launch_depths:
        harness = fake_engine(seed, launch_depth, is_cached=True, has_poison=seed % 2 == 1)
        for _ in range(2):  # the second time, the first one's prefixes are there
            outcomes = play(harness.engine, trace)
            check_same(plain, outcomes)
            reached += Counter(f"ended for {outcome.finish_reason}" for outcome in outcomes)
        stats = harness.engine.prefix_cache_stats()
        counted = ("num_lookups", "num_hits", "num_cached_tokens", "num_waits", "num_evicted_snapshots")
        reached += Counter({name.removeprefix("num_"): stats[name] for name in counted})
        reached += Counter({"evicted requests": harness.ledger.stats().num_evictions})
        reached += Counter({"pauses": 2 * sum(len(arrival.pauses) for arrival in trace)})
        harness.engine.close()
    return reached


def test_the_cache_changes_no_outcome_at_any_depth() -> None:
    reached = sum((check_trace(seed, range(4)) for seed in range(6)), Counter[str]())
    assert reached["hits"] > 50
    assert min(reached[name] for name in ("ended for abort", "pauses", "evicted_snapshots")) > 0


@pytest.mark.long
@pytest.mark.parametrize("shard", range(NUM_SHARDS))
def test_the_cache_changes_no_outcome_over_ten_thousand_traces(shard: int) -> None:
    """One depth each."""
    reached = sum((check_trace(seed, [seed // 2 % 4]) for seed in seeds_of(shard)), Counter[str]())
    total = record_shard(EVIDENCE, shard, reached)
    if total is None:
        return
    assert total["traces"] == 10_000
    assert min(total[name] for name in ("hits", "pauses", "ended for abort", "evicted_snapshots")) > 10_000


def test_a_state_that_is_not_restored_is_seen() -> None:
    """The control of the tests above: without the restore the very same comparison fails."""
    num_seen = 0
    for seed in range(6):
        trace = shared_trace(seed)
        plain = play(fake_engine(seed, 0, is_cached=False).engine, without_rewinds(trace))
        spoilt = fake_engine(seed, 0, is_cached=True, forgets_to_restore=True)
        try:
            for _ in range(2):
                check_same(plain, play(spoilt.engine, trace))
        except AssertionError:
            num_seen += 1
    assert num_seen >= 4


def test_a_state_read_from_a_free_slot_is_seen() -> None:
    """The control of the poison: rows that read what was given back meet NaN at once."""
    num_seen = 0
    for seed in range(6):
        spoilt = fake_engine(seed, 0, is_cached=True, forgets_to_restore=True, has_poison=True)
        try:
            for _ in range(2):
                play(spoilt.engine, shared_trace(seed))
        except EngineDeadError as error:
            num_seen += "NaN" in str(error)
    assert num_seen >= 5


@pytest.fixture(scope="module")
def cached(tiny_model_dir: Path) -> Iterator[LLM]:
    with LLM(tiny_model_dir, max_num_batched_tokens=48, **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path) -> Iterator[LLM]:
    with LLM(tiny_model_dir, max_num_batched_tokens=48, enable_prefix_caching=False, **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module", params=[0, 2])
def poisoned(tiny_model_dir: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Compares host and device too, and keeps states on the way, running ahead and not."""
    sizes = {"max_num_batched_tokens": 48, "launch_depth": request.param, "snapshot_stride_tokens": 16}
    with LLM(tiny_model_dir, check_mirror=True, **sizes, **SETTINGS) as llm:
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


@pytest.mark.parametrize("check_mirror", [False, True])
@pytest.mark.parametrize("launch_depth", [0, 1, 3])
def test_an_answer_that_a_stop_string_ended_is_there_for_the_next_turn(
    tiny_model_dir: Path, plain: LLM, launch_depth: int, check_mirror: bool
) -> None:
    """Steps beyond it are in flight by then, and still are when that turn comes, unless each step is checked.

    Over a window the state goes back to where the answer ends, and the turn waits for those steps.
    """
    prompt = list(prompt_of(70, 7))
    text = plain.generate({"prompt_token_ids": prompt}, GREEDY)[0].outputs[0].text
    stopped = replace(GREEDY, stop=[text[len(text) // 2 :][:3]])
    with LLM(
        tiny_model_dir, launch_depth=launch_depth, state_window=16, check_mirror=check_mirror, **SETTINGS
    ) as llm:
        answer = llm.generate({"prompt_token_ids": prompt}, stopped)[0].outputs[0]
        assert answer.finish_reason == "stop"
        said = [*prompt, *answer.token_ids]
        turn = {"prompt_token_ids": [*said, *prompt_of(9)]}
        found, expected = (each.generate(turn, GREEDY)[0] for each in (llm, plain))
    assert found.num_cached_tokens == len(said) - 1
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids


def test_free_slots_full_of_nan_change_nothing(poisoned: LLM, plain: LLM) -> None:
    with_cache, without = conversation(poisoned, 5), conversation(plain, 5)
    assert [turn[:2] for turn in with_cache] == [turn[:2] for turn in without]
    assert all(num_cached for _, _, num_cached in with_cache[1:])
    for seed in range(2):
        trace = random_trace(
            seed, prompt_of=shared_prompt, max_prompt_len=40, max_tokens=12, stops=["e"], has_pauses=True
        )
        check_same(play(plain._engine, trace), play(poisoned._engine, trace))


def test_a_snapshot_that_is_freed_too_early_is_seen(poisoned: LLM) -> None:
    """The control of the test above; afterwards all is well again, since new rows read no old state."""
    prompt = {"prompt_token_ids": list(prompt_of(90, 5))}
    expected = poisoned.generate(prompt, GREEDY)[0].outputs[0].token_ids
    engine = poisoned._engine
    num_slots = engine.ledger.stats().slots_total
    engine._runner.poison_slots(range(1, num_slots + 1))
    output = poisoned.generate(prompt, GREEDY)[0]
    assert output.num_cached_tokens
    assert output.outputs[0].finish_reason == "error"
    poisoned.reset_prefix_cache()
    assert poisoned.generate(prompt, GREEDY)[0].outputs[0].token_ids == expected


@pytest.mark.parametrize("snapshot_memory_bytes", [None, 0])
def test_a_start_says_what_can_be_cached(
    tiny_model_dir: Path, caplog: pytest.LogCaptureFixture, snapshot_memory_bytes: int | None
) -> None:
    """Without room for a single state nothing is: neither looked up nor held."""
    with (
        caplog.at_level(logging.INFO, logger="headway"),
        LLM(tiny_model_dir, snapshot_memory_bytes=snapshot_memory_bytes, **SETTINGS) as llm,
    ):
        said = conversation(llm, 2)
        stats = llm.prefix_cache_stats()
    if snapshot_memory_bytes is None:
        assert "prefixes of 16 tokens and more are cached" in caplog.text
        assert said[1][2]
    else:
        assert "no prefix is cached: not one state of " in caplog.text
        assert set(stats.values()) == {0}


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


def test_the_bytes_of_snapshots_are_those_of_their_slots(cached: LLM) -> None:
    conversation(cached, 2)
    stats, caches = cached.prefix_cache_stats(), cached._engine._runner._caches
    slot_bytes = sum(pool[0].nbytes for pool in (*caches.conv_state, *caches.ssm_state))
    assert stats["snapshot_bytes"] == stats["num_snapshots"] * slot_bytes > 0


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
