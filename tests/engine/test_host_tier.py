"""The prefix cache's tier in host memory: what left the device comes back with the bits it had."""

from __future__ import annotations

import gc
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.config import GIB, EngineConfig
from headway.engine.assemble import model_bytes
from headway.engine.memory import plan_memory
from headway.engine.state_window import choose_window
from headway.errors import ConfigError, MemoryBudgetError
from headway.llm import LLM
from headway.models.registry import read_model_config
from headway.request import SamplingParams
from tests.engine.driving import prompt_of
from tests.engine.gpu import gpu_llm, tiny_trace
from tests.engine.test_prefix_bits import DTYPES, family_prompt
from tests.engine.traces import check_same, play

HOST_BYTES = 256 * 2**20
NUM_BLOCKS = 60  # a quarter is kept free, which holds the longest request here
NUM_SNAPSHOTS = 8
NUM_CHATS = 5
Answer = tuple[list[int], list[dict[int, float]]]


def small_pools(folder: Path, device: str, **settings: Any) -> dict[str, Any]:
    """Settings of an engine that cannot keep what its requests leave."""
    settings = {"max_num_seqs": 4, "max_model_len": 512, "launch_depth": 0, **settings}
    config, dtype = EngineConfig(**settings), getattr(torch, DTYPES[device])
    model = read_model_config(folder)
    sizes = model_bytes(
        model, config.block_size, dtype, choose_window(config, model, device, dtype, settings["launch_depth"])
    )
    memory = plan_memory(EngineConfig(**settings, snapshot_memory_bytes=0), sizes, device, 8 * GIB)
    rows = sum(line.num_bytes for line in memory.lines if line.name in ("state slots", "rows"))
    snapshot_bytes = NUM_SNAPSHOTS * sizes.per_slot
    return {
        **settings,
        "snapshot_memory_bytes": snapshot_bytes,
        "kv_cache_memory_bytes": rows + snapshot_bytes + (NUM_BLOCKS + 1) * sizes.per_block,
    }


@contextmanager
def small_llm(folder: Path, device: str, host_bytes: int = HOST_BYTES, **settings: Any) -> Iterator[LLM]:
    """Compares host and device after every step and fills free slots with NaN."""
    pools = small_pools(folder, device, **settings)
    with gpu_llm(
        folder,
        device=device,
        dtype=DTYPES[device],
        prefix_host_memory_bytes=host_bytes,
        **{"check_mirror": True, **pools},
    ) as llm:
        yield llm
        llm._engine.ledger.check_integrity()


def settle(llm: LLM) -> None:
    """Until all that should leave the device has left it, so that the next request evicts nothing uncopied."""
    llm._engine.step()
    while llm._engine.ledger.stats().num_transfers:
        llm._engine.step()


def ask(llm: LLM, tokens: Sequence[int], **how: Any) -> tuple[Answer, int]:
    """The answer with its logprobs, and how much of the prompt was found."""
    params = SamplingParams(temperature=0.0, max_tokens=19, ignore_eos=True, logprobs=2)
    output = llm.generate({"prompt_token_ids": list(tokens)}, params, **how)[0]
    answer = output.outputs[0]
    assert answer.logprobs is not None
    settle(llm)
    scores = [{token: entry.logprob for token, entry in step.items()} for step in answer.logprobs]
    return (list(answer.token_ids), scores), output.num_cached_tokens or 0


def chat(llm: LLM, num_turns: int = 3, **how: Any) -> tuple[list[Answer], list[int]]:
    """Conversations that take turns, so that each has left the device before it goes on."""
    said = [list(prompt_of(90 + 13 * i, i)) for i in range(NUM_CHATS)]
    answers, found = [], []
    for turn in range(num_turns):
        for i in range(NUM_CHATS):
            answer, num_cached = ask(llm, said[i], **how)
            answers.append(answer)
            found.append(num_cached)
            said[i] += [*answer[0], *prompt_of(7, 100 * turn + i)]
    return answers, found


@pytest.mark.parametrize("launch_depth", [0, 2])
def test_conversations_come_back_as_they_were(tiny_model_dir: Path, device: str, launch_depth: int) -> None:
    """Ends within a block, with the log that a state window leaves beside a state: as with a cache that holds all."""
    settings = {"device": device, "dtype": DTYPES[device], "launch_depth": launch_depth, "max_num_seqs": 4}
    with gpu_llm(tiny_model_dir, **settings) as llm:
        expected, all_found = chat(llm)
        assert llm.prefix_cache_stats()["num_evicted_snapshots"] == 0
    with small_llm(tiny_model_dir, device, launch_depth=launch_depth) as llm:
        answers, found = chat(llm)
        stats = llm.prefix_cache_stats()
    assert found == all_found
    assert answers == expected
    assert stats["num_host_hits"] >= NUM_CHATS
    assert stats["num_loaded_snapshots"] >= NUM_CHATS
    assert stats["num_loaded_blocks"] > 3 * NUM_CHATS


@pytest.mark.parametrize("launch_depth", range(4))
def test_random_traces_have_the_bits_of_those_without_a_cache(
    tiny_model_dir: Path, device: str, launch_depth: int
) -> None:
    """Aborts, pauses, stops and evictions among them."""
    settings = {"launch_depth": launch_depth, "batch_invariant": True, "max_num_seqs": 3}
    num_loaded = 0
    traces = [tiny_trace(seed, prompt_of=family_prompt, num_requests=10, max_tokens=12) for seed in range(3)]
    with gpu_llm(
        tiny_model_dir,
        device=device,
        dtype=DTYPES[device],
        enable_prefix_caching=False,
        **{**settings, "launch_depth": 0},
    ) as llm:
        expected = [play(llm._engine, trace) for trace in traces]
    with small_llm(tiny_model_dir, device, **settings) as llm:
        for _ in range(2):
            for seed, trace in enumerate(traces):
                check_same(expected[seed], play(llm._engine, trace), f"seed {seed}")
        stats = llm.prefix_cache_stats()
        num_loaded += stats["num_loaded_snapshots"]
    assert num_loaded > 0
    assert stats["num_host_hits"] > 0


def test_other_salts_find_nothing_and_a_reset_empties_both_tiers(tiny_model_dir: Path, device: str) -> None:
    with small_llm(tiny_model_dir, device) as llm:
        chat(llm, cache_salt="tenant a")
        first = list(prompt_of(90, 0))
        assert llm.prefix_cache_stats()["num_host_snapshots"] > 0
        for salt in ("tenant b", None):
            assert ask(llm, first, cache_salt=salt)[1] == 0
            llm.reset_prefix_cache()
            assert llm.prefix_cache_stats()["num_host_snapshots"] == 0
            chat(llm, cache_salt="tenant a", num_turns=1)
        chat(llm, cache_salt="tenant a", num_turns=1)
        assert ask(llm, first, cache_salt="tenant a")[1] > 0


def test_a_request_that_is_aborted_while_its_prefix_returns_holds_nothing(tiny_model_dir: Path) -> None:
    """What it asked for arrives all the same, and others find it."""
    with small_llm(tiny_model_dir, "cpu") as llm:
        chat(llm, num_turns=1)
        engine, prompt = llm._engine, list(prompt_of(90, 0))
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        request = engine.submit(engine.check("r", 0, None, prompt, params))
        engine.step()
        assert engine.ledger.stats().num_transfers > 0
        engine.abort(request)
        assert engine.num_unfinished == 0
        before = llm.prefix_cache_stats()["num_loaded_snapshots"]
        settle(llm)
        assert llm.prefix_cache_stats()["num_loaded_snapshots"] == before + 1
        assert ask(llm, prompt)[1] > 0


def test_a_copy_that_fails_ends_the_engine(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headway.engine import host_tier
    from headway.errors import EngineDeadError

    def broken(*_: object) -> None:
        raise RuntimeError("the bus is gone")

    pools = small_pools(tiny_model_dir, "cpu")
    with gpu_llm(
        tiny_model_dir, device="cpu", dtype="float32", prefix_host_memory_bytes=HOST_BYTES, **pools
    ) as llm:
        monkeypatch.setattr(host_tier, "move_records", broken)
        with pytest.raises(EngineDeadError, match="the bus is gone"):
            chat(llm)


def dropped_tier_memory(folder: Path, device: str) -> torch.Tensor:
    """Of an engine that goes while it waits for a prefix, without being closed."""
    settings = {"device": device, "dtype": DTYPES[device], "prefix_host_memory_bytes": HOST_BYTES}
    llm = LLM(folder, **{**settings, **small_pools(folder, device)})
    chat(llm, num_turns=1)
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    llm._engine.submit(llm._engine.check("r", 0, None, list(prompt_of(90, 0)), params))
    llm._engine.step()
    tier = llm._engine._runner.host_tier  # type: ignore[attr-defined]
    _, _, (_, memory, is_pinned), _ = tier._end.peek()
    assert is_pinned == memory.is_pinned() == (device == "cuda")
    return memory


def test_an_engine_that_is_dropped_unpins_its_host_memory(tiny_model_dir: Path, device: str) -> None:
    for _ in range(2):
        memory = dropped_tier_memory(tiny_model_dir, device)
        gc.collect()
        assert not memory.is_pinned()
        names = {thread.name for thread in threading.enumerate()}
        assert "headway-cpu-stream" not in names


def test_a_program_that_never_closes_its_engine_ends(tiny_model_dir: Path, device: str) -> None:
    program = f"""
from pathlib import Path
from tests.engine.test_host_tier import *
folder, device = Path({str(tiny_model_dir)!r}), {device!r}
settings = {{"device": device, "dtype": DTYPES[device], "prefix_host_memory_bytes": HOST_BYTES}}
kept = LLM(folder, **{{**settings, **small_pools(folder, device)}})
chat(kept, num_turns=1)
kept._engine.submit(kept._engine.check("r", 0, None, list(prompt_of(90, 0)), SamplingParams(max_tokens=2)))
kept._engine.step()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    assert "Error" not in ended.stderr


def test_a_start_says_what_host_memory_holds(tiny_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="headway"), small_llm(tiny_model_dir, "cpu") as llm:
        chat(llm, num_turns=1)
        held = llm.prefix_cache_stats()
    found = re.search(r"host memory holds (\d+) blocks and (\d+) states of prefixes", caplog.text)
    assert found
    assert int(found[1]) >= held["num_host_blocks"] > 0
    assert int(found[2]) >= held["num_host_snapshots"] > 0


def test_without_it_nothing_is_kept_in_host_memory(tiny_model_dir: Path) -> None:
    with small_llm(tiny_model_dir, "cpu", host_bytes=0) as llm:
        _, found = chat(llm)
        stats = llm.prefix_cache_stats()
        assert llm._engine._runner.host_tier is None  # type: ignore[attr-defined]
    assert max(found) == 0
    assert stats["num_evicted_blocks"] > 0
    assert not any(value for name, value in stats.items() if "host" in name or "saved" in name)


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"enable_prefix_caching": False}, "0 where no prefix is cached"),
        ({"snapshot_memory_bytes": 0}, "0 where no prefix is cached"),
        ({"prefix_host_memory_bytes": 1000}, "0, or enough for a few blocks and states"),
        ({"prefix_host_memory_bytes": -1}, "of at least 0"),
    ],
)
def test_sizes_of_no_use_are_refused(tiny_model_dir: Path, settings: dict[str, Any], limit: str) -> None:
    with pytest.raises(ConfigError, match=f"prefix_host_memory_bytes .*{limit}"):
        LLM(tiny_model_dir, device="cpu", **{"prefix_host_memory_bytes": HOST_BYTES, **settings})


def test_more_than_the_machine_has_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(MemoryBudgetError, match="prefix_host_memory_bytes is"):
        LLM(tiny_model_dir, device="cpu", prefix_host_memory_bytes=2**60)
