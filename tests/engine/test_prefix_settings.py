"""The prefix cache under random settings, in models of attention alone, of Mamba alone and of both: every request gets
what an engine without a cache gives it alone, bit for bit.

Requests repeat, shorten and continue each other, with salts, n, prompt log-probabilities, penalties, stop strings and
opting out among them; they are aborted before they run and in the middle, set back and evicted; the cache is emptied
under them; pools hold little more than one sequence, and host memory keeps what leaves them.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.config import EngineConfig
from headway.engine.assemble import model_bytes
from headway.engine.completion import Request
from headway.engine.engine import Engine
from headway.engine.memory import plan_memory
from headway.engine.state_window import choose_window
from headway.llm import LLM
from headway.models.registry import read_model_config
from headway.request import SamplingParams
from tests.engine.traces import drain, rewind

PATTERNS = ("*-*", "MM", "M*-", "MEM*")
WIDTHS = {"hidden_size": 64, "intermediate_size": 64, "mamba_num_heads": 2, "n_groups": 1}
HEADS = {"num_attention_heads": 1, "num_key_value_heads": 1}
EXPERTS = {"moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32}
MAX_LEN, MAX_STEPS = 256, 20_000
LOADED: dict[str, Any] = {
    "load_format": "dummy",
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": MAX_LEN,
}
REASONS = ("too_short", "pending", "without_snapshot", "other_salt", "without_kv")


@dataclass(frozen=True)
class Asked:
    request: Request
    prompt: list[int]
    params: SamplingParams
    uses_cache: bool


def small_model(shipped: Path, folder: Path, pattern: str) -> Path:
    settings = json.loads((shipped / "config.json").read_text())
    settings |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    (folder / "config.json").write_text(json.dumps(settings | WIDTHS | HEADS | EXPERTS))
    (folder / "tokenizer.json").write_bytes((shipped / "tokenizer.json").read_bytes())
    return folder


def random_settings(draws: random.Random, folder: Path) -> dict[str, Any]:
    max_rows = draws.choice([1, 2, 4])
    settings: dict[str, Any] = {
        "max_num_seqs": max_rows,
        "block_size": draws.choice([8, 16, 32]),
        "max_num_batched_tokens": draws.choice([20, 48, 300]),
        "launch_depth": draws.randrange(4),
        "snapshot_stride_tokens": draws.choice([0, 24, 50, 512]),
        "decode_snapshot_stride_tokens": draws.choice([0, 5, 16]),
        "snapshot_eviction": draws.choice(["lru", "cost"]),
        "waypoint_share": draws.choice([0.0, 0.5, 1.0]),
        "check_mirror": draws.random() < 0.5,
        "state_window": draws.choice([0, 16]) if read_model_config(folder).mamba else 0,
    }
    return settings | (tiny_pools(draws, folder, settings) if draws.random() < 0.6 else {})


def tiny_pools(draws: random.Random, folder: Path, settings: dict[str, Any]) -> dict[str, int]:
    """For one sequence and a little more, or two; host memory beside them more often than not."""
    config = EngineConfig(max_model_len=MAX_LEN, snapshot_memory_bytes=0, **settings)
    model = read_model_config(folder)
    window = choose_window(config, model, "cpu", torch.float32, settings["launch_depth"])
    sizes = model_bytes(model, config.block_size, torch.float32, window)
    lines = plan_memory(config, sizes, "cpu", 2**33).lines
    rows = sum(line.num_bytes for line in lines if line.name in ("state slots", "rows"))
    num_blocks = MAX_LEN // config.block_size
    num_blocks = draws.choice([num_blocks + 1, num_blocks + 8, 2 * num_blocks + 3])
    snapshots = draws.choice([1, 2, 5, 20]) * sizes.per_slot
    host = draws.choice([0, 10, 26, 66]) * (sizes.per_block + sizes.per_slot)
    return {
        "snapshot_memory_bytes": snapshots,
        "kv_cache_memory_bytes": rows + snapshots + num_blocks * sizes.per_block,
        "prefix_host_memory_bytes": host,
    }


def random_prompt(
    draws: random.Random, families: list[list[int]], said: list[list[int]], size: int
) -> list[int]:
    """What was said before, or most of it, or more; or the beginning of a family, blocks of the size among them."""
    if said and draws.random() < 0.45:
        known = draws.choice(said)
        cut = draws.choice([0, 0, 1, 2, size])
        return (known[: max(1, len(known) - cut)] + random_tokens(draws, draws.choice([0, 1, 9, 40])))[:230]
    length = draws.choice([size - 1, size, size + 1, 2 * size, 3 * size + 1, draws.randrange(1, 190)])
    return draws.choice(families)[:length] + random_tokens(draws, draws.choice([0, 0, 1, 20]))


def random_tokens(draws: random.Random, num_tokens: int) -> list[int]:
    return [draws.randrange(3, 60) for _ in range(num_tokens)]


def random_params(draws: random.Random) -> SamplingParams:
    is_sampled = draws.random() < 0.5
    return SamplingParams(
        max_tokens=draws.choice([1, 2, 17, 24]),
        temperature=0.9 if is_sampled else 0.0,
        n=draws.choice([1, 1, 2, 3]) if is_sampled else 1,
        seed=draws.randrange(99),
        ignore_eos=True,
        logprobs=draws.choice([None, 1]),
        prompt_logprobs=1 if draws.random() < 0.15 else None,
        presence_penalty=0.7 if draws.random() < 0.2 else 0.0,
        stop=draws.choice([[], [], [], ["e"], ["a", "th"], [" "]]),
    )


def disturb(draws: random.Random, engine: Engine, asked: list[Asked]) -> None:
    request = draws.choice(asked).request
    if draws.random() < 0.02:
        engine.ledger.reset_prefix_cache()
    if draws.random() < 0.04:
        engine.abort(request)
    if draws.random() < 0.05:
        engine.ledger.evict(request.completions[0].ledger_id)
    if draws.random() < 0.1:
        rewind(engine, request, draws.randrange(4))


def run_requests(draws: random.Random, engine: Engine, block_size: int) -> list[Asked]:
    asked: list[Asked] = []
    families, said = [random_tokens(draws, 200) for _ in range(2)], []
    for index in range(draws.choice([10, 25])):
        prompt, params = random_prompt(draws, families, said, block_size), random_params(draws)
        uses_cache = draws.random() > 0.12
        how: dict[str, Any] = {"cache_salt": draws.choice([None, None, "a"]), "uses_prefix_cache": uses_cache}
        request = engine.submit(engine.check(str(index), 0, None, prompt, params, draws.randrange(2), **how))
        asked.append(Asked(request, prompt, params, uses_cache))
        if draws.random() < 0.15:
            engine.abort(request)
        for _ in range(draws.choice([0, 0, 1, 2, 30])):
            engine.step()
            engine.ledger.check_integrity()
            disturb(draws, engine, asked)
        over = (each for each in asked if each.request.completions[0].is_finished and len(each.prompt) < 200)
        said = [each.prompt + each.request.completions[0].token_ids for each in over]
    for _ in range(MAX_STEPS):
        if not engine.num_unfinished:
            break
        engine.step()
    drain(engine)
    return asked


def check_alike(asked: Asked, plain: Engine) -> None:
    """As alone in an engine without a cache; of what was aborted, as far as it came."""
    alone = plain.submit(plain.check("alone", 0, None, asked.prompt, asked.params))
    while plain.num_unfinished:
        plain.step()
    output, expected = asked.request.output(), alone.output()
    if asked.params.prompt_logprobs is not None or not asked.uses_cache:
        assert not output.num_cached_tokens
    for ours, theirs in zip(output.outputs, expected.outputs, strict=True):
        if ours.finish_reason == "abort":
            assert ours.token_ids == theirs.token_ids[: len(ours.token_ids)]
        else:
            assert ours == theirs
    if all(ours.finish_reason != "abort" for ours in output.outputs):
        assert output.prompt_logprobs == expected.prompt_logprobs


def check_seed(seed: int, shipped: Path, folder: Path) -> Counter[str]:
    """Returns what was reached."""
    draws = random.Random(seed)
    small_model(shipped, folder, PATTERNS[seed % len(PATTERNS)])
    settings = random_settings(draws, folder)
    with (
        LLM(folder, **LOADED, **settings) as llm,
        LLM(folder, **LOADED, block_size=settings["block_size"], enable_prefix_caching=False) as plain,
    ):
        for asked in run_requests(draws, llm._engine, settings["block_size"]):
            check_alike(asked, plain._engine)
        stats = llm.prefix_cache_stats()
        llm.reset_prefix_cache()
        free = llm._engine.ledger.stats()
    assert stats["num_lookups"] == stats["num_hits"] + sum(stats[f"num_{reason}"] for reason in REASONS)
    assert (free.blocks_free, free.slots_free) == (free.blocks_total, free.slots_total)
    return Counter(
        {name: stats[f"num_{name}"] for name in ("hits", "host_hits", "waits", "evicted_snapshots")}
    )


def test_random_settings_change_no_outcome(tiny_model_dir: Path, tmp_path: Path) -> None:
    reached = sum((check_seed(seed, tiny_model_dir, tmp_path) for seed in range(8)), Counter[str]())
    assert reached["hits"] > 8


@pytest.mark.long
@pytest.mark.parametrize("shard", range(10))
def test_random_settings_change_no_outcome_at_length(
    shard: int, tiny_model_dir: Path, tmp_path: Path
) -> None:
    seeds = range(100 + 40 * shard, 140 + 40 * shard)
    reached = sum((check_seed(seed, tiny_model_dir, tmp_path) for seed in seeds), Counter[str]())
    assert min(reached.values()) > 0
