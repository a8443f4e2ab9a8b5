"""Launch-ahead against serial steps on a GPU, over many traces, with host and device compared throughout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.core import evidence
from tests.engine.driving import prompt_of
from tests.engine.gpu import gpu_llm, tiny_trace
from tests.engine.test_depth import ENGINE_EVIDENCE
from tests.engine.traces import Arrival, check_same, play

NUM_TRACES = 500
GRID_TOKENS, MAX_DECODE_QUERIES = 64, 8


def whole_or_long(length: int, seed: int = 0) -> list[int]:
    """A prompt whose last piece, if it is cut, is not so short that attention takes it for a decode row: that kernel
    rounds otherwise, and where prompts are cut follows from what else is in the step.
    """
    is_short_end = length > GRID_TOKENS and 0 < length % GRID_TOKENS <= MAX_DECODE_QUERIES
    return prompt_of(length + MAX_DECODE_QUERIES * is_short_end, seed)


def gpu_trace(seed: int) -> list[Arrival]:
    return tiny_trace(seed, prompt_of=whole_or_long, num_requests=6, max_tokens=12)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu", "invariant_products")
def test_five_hundred_traces_give_what_serial_steps_give(tiny_model_dir: Path) -> None:
    """No evictions here: what is recomputed as a prompt is rounded by other kernels. Depths 1 to 4 take turns."""
    reached = Counter(traces=NUM_TRACES)
    with gpu_llm(tiny_model_dir, launch_depth=0) as llm:
        expected = [play(llm._engine, gpu_trace(seed)) for seed in range(NUM_TRACES)]
    for launch_depth in (1, 2, 3, 4):
        with gpu_llm(tiny_model_dir, launch_depth=launch_depth) as llm:
            for seed in range(launch_depth - 1, NUM_TRACES, 4):
                outcomes = play(llm._engine, gpu_trace(seed))
                check_same(expected[seed], outcomes, f"seed {seed}, depth {launch_depth}")
                reached.update(outcome.finish_reason or "" for outcome in outcomes)
            stats = llm._engine.ledger.stats()
            assert stats.num_evictions == 0
            reached["steps"] += stats.steps_committed
    assert {"stop", "length", "abort"} <= set(reached)
    evidence.record("launch-ahead equals serial, GPU, depths 1 to 4", dict(reached), ENGINE_EVIDENCE)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("launch_depth", [0, 1, 3])
def test_host_and_device_agree_over_traces(tiny_model_dir: Path, launch_depth: int) -> None:
    """Evictions are certain here."""
    pools = {"max_model_len": 192, "kv_cache_memory_bytes": 8 * 2**20}
    with gpu_llm(tiny_model_dir, launch_depth=launch_depth, check_mirror=True, **pools) as llm:
        for seed in range(8):
            play(llm._engine, tiny_trace(seed, max_tokens=40, num_requests=12))
        assert llm._engine.ledger.stats().num_evictions > 0
