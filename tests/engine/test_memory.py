"""The memory plan: nothing above the budget, and a refusal names a flag with a value that is then accepted."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest

from headway.config import GIB, MIB, EngineConfig
from headway.engine.memory import ModelBytes, plan_memory
from headway.errors import ConfigError, MemoryBudgetError

HYBRID = ModelBytes(
    weights=18 * GIB,
    per_block=64 * 1024,
    per_slot=90 * MIB,
    per_step_token=100_000,
    per_sampled_row=1_500_000,
    max_position=131_072,
)
ATTENTION_ONLY = dataclasses.replace(HYBRID, per_slot=0)
MAMBA_ONLY = dataclasses.replace(HYBRID, per_block=0)


@pytest.mark.parametrize("model", [HYBRID, ATTENTION_ONLY, MAMBA_ONLY])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("free_gib", [22, 24, 40, 125])
def test_a_plan_fits_its_budget_and_one_sequence(model: ModelBytes, device: str, free_gib: int) -> None:
    plan = plan_memory(EngineConfig(), model, device, free_gib * GIB)
    assert plan.total_bytes <= free_gib * GIB
    assert plan.max_rows >= 1
    assert plan.max_rows <= plan.max_step_tokens
    if model.per_block:
        assert plan.num_blocks * plan.block_size >= plan.max_model_len
    assert plan.num_slots == (plan.max_rows if model.per_slot else 0)


def test_more_memory_never_gives_less() -> None:
    plans = [plan_memory(EngineConfig(), HYBRID, "cuda", gib * GIB) for gib in range(22, 130, 6)]
    for smaller, larger in itertools.pairwise(plans):
        assert larger.max_rows >= smaller.max_rows
        assert larger.max_model_len >= smaller.max_model_len


def test_pools_are_not_larger_than_rows_can_use() -> None:
    small = dataclasses.replace(HYBRID, weights=MIB, per_slot=MIB, max_position=256)
    plan = plan_memory(EngineConfig(max_num_seqs=4), small, "cuda", 100 * GIB)
    assert plan.num_blocks == 4 * 256 // 16
    assert plan.num_slots == 4


def test_a_cpu_keeps_room_for_others() -> None:
    plan = plan_memory(EngineConfig(), dataclasses.replace(HYBRID, weights=MIB), "cpu", 64 * GIB)
    caches = [line.num_bytes for line in plan.lines if line.name in ("KV cache", "state slots", "rows")]
    assert sum(caches) <= 4 * GIB


def test_asked_cache_size_is_kept() -> None:
    plan = plan_memory(EngineConfig(kv_cache_memory_bytes=2 * GIB, max_num_seqs=2), HYBRID, "cuda", 40 * GIB)
    caches = [line.num_bytes for line in plan.lines if line.name in ("KV cache", "state slots", "rows")]
    assert sum(caches) <= 2 * GIB


@pytest.mark.parametrize(
    ("settings", "free_gib"),
    [
        ({"max_num_seqs": 1000}, 40),
        ({"max_model_len": 131_072, "max_num_seqs": 8, "kv_cache_memory_bytes": GIB}, 40),
        ({"max_model_len": 65_536, "max_num_seqs": 1}, 20),
    ],
)
def test_a_refusal_names_a_flag_and_a_value_that_fits(settings: dict[str, Any], free_gib: int) -> None:
    model = dataclasses.replace(HYBRID, weights=17 * GIB, per_block=MIB)
    with pytest.raises(MemoryBudgetError) as caught:
        plan_memory(EngineConfig(**settings), model, "cuda", free_gib * GIB)
    found = re.search(r"--([a-z-]+) (\d+) would fit", str(caught.value))
    assert found is not None, caught.value
    better = {**settings, found[1].replace("-", "_"): int(found[2])}
    assert plan_memory(EngineConfig(**better), model, "cuda", free_gib * GIB).total_bytes <= free_gib * GIB


def test_a_cache_too_small_for_one_request_names_one_that_is_not() -> None:
    with pytest.raises(MemoryBudgetError, match="short request needs") as caught:
        plan_memory(EngineConfig(kv_cache_memory_bytes=1000), HYBRID, "cuda", 40 * GIB)
    found = re.search(r"--kv-cache-memory-bytes (\d+) would fit", str(caught.value))
    assert found is not None
    assert (
        plan_memory(EngineConfig(kv_cache_memory_bytes=int(found[1])), HYBRID, "cuda", 40 * GIB).num_blocks
        > 0
    )


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_step_too_large_names_one_that_fits(device_type: str) -> None:
    wide = EngineConfig(max_num_batched_tokens=2**20)
    with pytest.raises(MemoryBudgetError) as caught:
        plan_memory(wide, HYBRID, device_type, 40 * GIB)
    found = re.search(r"--max-num-batched-tokens (\d+) would fit", str(caught.value))
    assert found is not None
    narrower = EngineConfig(max_num_batched_tokens=int(found[1]))
    assert plan_memory(narrower, HYBRID, device_type, 40 * GIB).total_bytes <= 40 * GIB


def test_a_length_beyond_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len .* at most"):
        plan_memory(EngineConfig(max_model_len=HYBRID.max_position + 1), HYBRID, "cuda", 40 * GIB)


def test_weights_that_do_not_fit_name_the_memory_needed() -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        plan_memory(EngineConfig(), HYBRID, "cpu", 10 * GIB)
    found = re.search(r"--cpu-memory-bytes (\d+)MiB", str(caught.value))
    assert found is not None
    assert plan_memory(EngineConfig(), HYBRID, "cpu", int(found[1]) * MIB).num_blocks > 0


def test_the_table_lists_every_part_and_the_total() -> None:
    text = str(plan_memory(EngineConfig(max_num_seqs=4), HYBRID, "cuda", 40 * GIB))
    for name in ("weights", "KV cache", "state slots", "rows", "workspace", "total"):
        assert name in text


@pytest.mark.parametrize("free_gib", [22, 24, 40, 125, 1000])
def test_cached_states_get_their_share_or_what_nobody_can_use(free_gib: int) -> None:
    with_cache = plan_memory(EngineConfig(), HYBRID, "cuda", free_gib * GIB)
    without = plan_memory(EngineConfig(enable_prefix_caching=False), HYBRID, "cuda", free_gib * GIB)
    assert without.num_snapshots == 0
    assert with_cache.max_model_len == without.max_model_len
    assert with_cache.num_snapshots <= 8 * with_cache.max_rows
    snapshot_bytes = with_cache.num_snapshots * HYBRID.per_slot
    caches = sum(line.num_bytes for line in with_cache.lines if line.name in ("KV cache", "cached states"))
    is_share = snapshot_bytes <= (caches + HYBRID.per_block) / 3 + HYBRID.per_slot
    is_ample = with_cache.num_blocks == without.num_blocks and free_gib == 1000
    assert is_ample or is_share


def test_a_model_without_states_needs_no_snapshots() -> None:
    assert plan_memory(EngineConfig(), ATTENTION_ONLY, "cuda", 40 * GIB).num_snapshots == 0


def test_snapshot_memory_is_as_asked_or_refused() -> None:
    config = EngineConfig(snapshot_memory_bytes=900 * MIB, max_num_seqs=8)
    assert plan_memory(config, HYBRID, "cuda", 40 * GIB).num_snapshots == 10
    config = EngineConfig(snapshot_memory_bytes=0, max_num_seqs=8)
    assert plan_memory(config, HYBRID, "cuda", 40 * GIB).num_snapshots == 0
    too_much = EngineConfig(snapshot_memory_bytes=60 * GIB, max_num_seqs=8)
    with pytest.raises(MemoryBudgetError, match="snapshot_memory_bytes") as refusal:
        plan_memory(too_much, HYBRID, "cuda", 40 * GIB)
    fitting = int(re.search(r"--snapshot-memory-bytes (\d+)", str(refusal.value)).group(1))  # type: ignore[union-attr]
    accepted = EngineConfig(snapshot_memory_bytes=fitting, max_num_seqs=8)
    assert plan_memory(accepted, HYBRID, "cuda", 40 * GIB).total_bytes <= 40 * GIB
