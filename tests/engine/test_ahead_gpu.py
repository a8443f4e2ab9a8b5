"""Launch-ahead against serial steps on a GPU, over many traces, with host and device compared throughout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.core import evidence
from tests.engine.gpu import INVARIANT, gpu_llm, tiny_pools, tiny_trace
from tests.engine.test_depth import ENGINE_EVIDENCE
from tests.engine.traces import Arrival, Outcome, check_same, play

NUM_TRACES = 500


def gpu_trace(seed: int) -> list[Arrival]:
    return tiny_trace(seed, num_requests=6, max_tokens=12)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_five_hundred_traces_give_what_serial_steps_give(tiny_model_dir: Path) -> None:
    """Depths 1 to 4 take turns. Nothing is evicted here: what is decoded is rounded otherwise when it is computed again
    as a prompt.
    """
    reached, different = Counter(traces=NUM_TRACES), []
    traces = [gpu_trace(seed) for seed in range(NUM_TRACES)]
    with gpu_llm(tiny_model_dir, launch_depth=0, **INVARIANT) as llm:
        expected = [play(llm._engine, trace) for trace in traces]
    for launch_depth in (1, 2, 3, 4):
        with gpu_llm(tiny_model_dir, launch_depth=launch_depth, **INVARIANT) as llm:
            for seed in range(launch_depth - 1, NUM_TRACES, 4):
                outcomes = play(llm._engine, traces[seed])
                try:
                    check_same(expected[seed], outcomes, f"seed {seed}, depth {launch_depth}")
                except AssertionError as error:
                    different.append(
                        str(error).partition("\n")[0] + describe(traces[seed], expected[seed], outcomes)
                    )
                reached.update(outcome.finish_reason or "" for outcome in outcomes)
            stats = llm._engine.ledger.stats()
            assert stats.num_evictions == 0
            reached["steps"] += stats.steps_committed
    assert not different, "\n".join([f"{len(different)} traces", *different])
    assert {"stop", "length", "abort"} <= set(reached)
    evidence.record("launch-ahead equals serial, GPU, depths 1 to 4", dict(reached), ENGINE_EVIDENCE)


def describe(trace: Sequence[Arrival], serial: Sequence[Outcome], ahead: Sequence[Outcome]) -> str:
    """Of each request that differs: its prompt's length, and the first output whose token or logprob does."""
    texts = []
    for arrival, one, other in zip(trace, serial, ahead, strict=True):
        pairs = zip(one.token_ids, other.token_ids, strict=False)
        places = [place for place, (a, b) in enumerate(pairs) if a != b]
        scores = [
            place for place, (a, b) in enumerate(zip(one.logprobs, other.logprobs, strict=False)) if a != b
        ]
        if places or scores:
            texts.append(f" prompt {len(arrival.prompt)}: token {places[:1]}, logprob {scores[:1]}")
    return ";".join(texts)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("launch_depth", [0, 1, 3])
def test_host_and_device_agree_over_traces(tiny_model_dir: Path, launch_depth: int) -> None:
    """Evictions are certain here."""
    with gpu_llm(tiny_model_dir, check_mirror=True, **tiny_pools(tiny_model_dir, launch_depth)) as llm:
        for seed in range(8):
            play(llm._engine, tiny_trace(seed, max_tokens=40, num_requests=12))
        assert llm._engine.ledger.stats().num_evictions > 0
