"""Launching ahead changes nothing that a caller sees: outcomes at depths 1 to 4 are those of depth 0."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from headway.llm import LLM
from tests.core import evidence
from tests.engine.driving import prompt_of
from tests.engine.fake_model import Harness, make_engine
from tests.engine.traces import Arrival, check_same, play, random_trace, without_rewinds

ENGINE_EVIDENCE = evidence.RESULTS.with_name("engine_evidence.json")
NUM_SHARDS, TRACES_PER_SHARD = 20, 500  # of the long runs, for as many processes
STOPS = ["aB", "bAc", "Ab"]


class LetterDetokenizer:
    """Every token is two letters."""

    def append(self, token_id: int) -> str:
        return chr(ord("a") + token_id // 26) + chr(ord("A") + token_id % 26)

    def extend(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.append, token_ids))

    def finish(self) -> str:
        return ""


def fake_trace(seed: int) -> list[Arrival]:
    return random_trace(
        seed, prompt_of=prompt_of, max_prompt_len=40, max_tokens=20, stops=STOPS, has_rewinds=True
    )


def fake_engine(seed: int, launch_depth: int, *, is_padded: bool = False) -> Harness:
    """Pools that are large, small or too small for two requests, as the seed has it; every third has keys alone."""
    draws = random.Random(seed)
    max_rows = draws.choice([3, 6])
    return make_engine(
        num_blocks=draws.choice([17, 24, 60]),
        max_rows=max_rows,
        num_slots=draws.choice([2, 6]) if seed % 3 else 0,
        max_step_tokens=draws.choice([6, 13, 64]),
        launch_depth=launch_depth,
        row_buckets=(2, max_rows) if is_padded else (),
        make_detokenizer=lambda ids, skip: LetterDetokenizer(),
    )


def check_trace(seed: int) -> Counter[str]:
    """Depths 1 to 4 against depth 0 without rewinds; returns what was reached."""
    trace, reached = fake_trace(seed), Counter[str]()
    serial = play(fake_engine(seed, 0).engine, without_rewinds(trace))
    for launch_depth in range(5):
        engine = fake_engine(seed, launch_depth).engine
        outcomes = play(engine, trace)
        check_same(serial, outcomes)
        stats = engine.ledger.stats()
        reached += Counter(outcome.finish_reason for outcome in outcomes)
        reached += Counter({"steps": stats.steps_committed, "evictions": stats.num_evictions})
        reached += Counter({"stop strings": sum(isinstance(o.stop_reason, str) for o in outcomes)})
        engine.close()
    return reached


REWOUND_AND_EVICTED_IN_ONE_PLAN = 10_503  # a seed


@pytest.mark.parametrize("seed", [*range(16), REWOUND_AND_EVICTED_IN_ONE_PLAN])
def test_every_depth_gives_what_depth_0_gives(seed: int) -> None:
    check_trace(seed)


def seeds_of(shard: int) -> range:
    return range(1000 + shard * TRACES_PER_SHARD, 1000 + (shard + 1) * TRACES_PER_SHARD)


def record_shard(section: str, shard: int, counts: Counter[str]) -> Counter[str] | None:
    """The sums once all shards are there."""
    return evidence.record_shard(section, shard, NUM_SHARDS, counts, ENGINE_EVIDENCE, evidence.ENGINE)


@pytest.mark.long
@pytest.mark.parametrize("shard", range(NUM_SHARDS))
def test_every_depth_gives_what_depth_0_gives_over_ten_thousand_traces(shard: int) -> None:
    reached = sum((check_trace(seed) for seed in seeds_of(shard)), Counter(traces=TRACES_PER_SHARD))
    total = record_shard("launch-ahead equals serial, fake model, depths 0 to 4", shard, reached)
    if total is None:
        return
    assert total["traces"] == 10_000
    assert min(total[name] for name in ("stop", "length", "abort", "evictions", "stop strings")) > 10_000


@pytest.mark.parametrize("launch_depth", [0, 1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_padded_decode_steps_give_the_same(seed: int, launch_depth: int) -> None:
    """The way of a captured graph: fixed arguments, the step number and its ring entry from the device's counter."""
    trace = fake_trace(seed)
    plain = play(fake_engine(seed, launch_depth).engine, trace)
    check_same(plain, play(fake_engine(seed, launch_depth, is_padded=True).engine, trace))


@pytest.fixture(scope="module")
def engines(tiny_model_dir: Path) -> Iterator[list[LLM]]:
    """The shipped model at depths 0 to 4, with room for two long sequences."""
    settings = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_model_len": 128}
    llms = [
        LLM(tiny_model_dir, max_num_batched_tokens=24, launch_depth=depth, **settings) for depth in range(5)
    ]
    yield llms
    for llm in llms:
        llm.close()


def check_shipped(engines: list[LLM], seed: int) -> Counter[str]:
    """The shipped model at depths 1 to 4 against depth 0; returns what was reached."""
    trace = random_trace(
        seed, prompt_of=prompt_of, max_prompt_len=60, max_tokens=16, stops=["e", "\n\n"], num_requests=8
    )
    serial = play(engines[0]._engine, trace)
    for llm in engines[1:]:
        check_same(serial, play(llm._engine, trace))
    reached = Counter(outcome.finish_reason for outcome in serial)
    return reached + Counter({"stop strings": sum(isinstance(o.stop_reason, str) for o in serial)})


@pytest.mark.parametrize("seed", range(3))
def test_the_shipped_model_gives_the_same_at_every_depth(engines: list[LLM], seed: int) -> None:
    check_shipped(engines, seed)


NUM_SHIPPED_SHARDS, SHIPPED_TRACES_PER_SHARD = 5, 100


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shard", range(NUM_SHIPPED_SHARDS))
def test_the_shipped_model_gives_the_same_over_five_hundred_traces(engines: list[LLM], shard: int) -> None:
    begin = 1000 + shard * SHIPPED_TRACES_PER_SHARD
    seeds = range(begin, begin + SHIPPED_TRACES_PER_SHARD)
    reached = sum((check_shipped(engines, seed) for seed in seeds), Counter(traces=len(seeds)))
    section = "launch-ahead equals serial, shipped model, depths 0 to 4"
    total = evidence.record_shard(
        section, shard, NUM_SHIPPED_SHARDS, reached, ENGINE_EVIDENCE, evidence.ENGINE
    )
    if total is not None:
        assert total["traces"] == 500
        assert min(total[name] for name in ("stop", "length", "abort", "stop strings")) > 100
