"""Decode steps as CUDA graphs: the bits of eager steps, nothing outside the rows, one launch and no copy a step."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.engine.graphs import row_buckets
from headway.layers.linear import Linear
from headway.request import SamplingParams
from tests.engine.driving import prompt_of, run_dry, submit, tokens_of
from tests.engine.gpu import INVARIANT, gpu_llm, tiny_pools, tiny_trace
from tests.engine.traces import check_same, drain, play

BLOCKING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMalloc",
)


def test_buckets_hold_every_number_of_rows_and_waste_little() -> None:
    assert row_buckets(1) == (1,)
    assert row_buckets(6) == (1, 2, 4, 6)
    assert row_buckets(24) == (1, 2, 4, 8, 16, 24)
    for max_rows in (3, 17, 256, 300, 5000):
        buckets = row_buckets(max_rows)
        assert list(buckets) == sorted(set(buckets))
        assert buckets[-1] == max_rows
        for num_rows in range(49, max_rows + 1):
            bucket = next(bucket for bucket in buckets if bucket >= num_rows)
            assert bucket - num_rows <= num_rows / 7
    assert len(row_buckets(256)) < 40


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("graph_capture_s", [0.0, 60.0])
def test_graphs_give_the_bits_of_eager_steps(
    tiny_model_dir: Path, dtype: str, graph_capture_s: float
) -> None:
    """Captured at start-up, or each at first need while requests run."""
    settings = {"dtype": dtype, "launch_depth": 0}
    with gpu_llm(tiny_model_dir, enforce_eager=True, **settings) as eager:
        expected = [play(eager._engine, tiny_trace(seed)) for seed in range(4)]
        assert eager._engine._runner.graphs is None
    with gpu_llm(tiny_model_dir, graph_capture_s=graph_capture_s, **settings) as llm:
        graphs = llm._engine._runner.graphs
        assert graphs is not None
        assert graphs.captured == (row_buckets(6) if graph_capture_s else ())
        for seed, outcomes in enumerate(expected):
            check_same(outcomes, play(llm._engine, tiny_trace(seed)))
        assert graphs.failure is None
        assert len(graphs.captured) >= 3


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("launch_depth", [1, 2, 3, 4])
def test_every_depth_gives_what_depth_0_gives(tiny_model_dir: Path, launch_depth: int) -> None:
    with gpu_llm(tiny_model_dir, launch_depth=0, **INVARIANT) as serial:
        expected = [play(serial._engine, tiny_trace(seed)) for seed in range(12)]
    with gpu_llm(tiny_model_dir, launch_depth=launch_depth, **INVARIANT) as ahead:
        for seed, outcomes in enumerate(expected):
            check_same(outcomes, play(ahead._engine, tiny_trace(seed)))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("launch_depth", [0, 1, 4])
def test_tiny_pools_lose_nobody(tiny_model_dir: Path, launch_depth: int) -> None:
    """Evictions are certain. What was sampled is recomputed in chunks then, so only ends and lengths are compared."""
    with gpu_llm(tiny_model_dir, **tiny_pools(tiny_model_dir, launch_depth)) as llm:
        engine = llm._engine
        prompts = [prompt_of(60 + 5 * i, i) for i in range(12)]
        requests = [submit(engine, prompt, max_tokens=60, ignore_eos=True) for prompt in prompts]
        run_dry(engine)
        drain(engine)
        assert engine.ledger.stats().num_evictions > 0
        assert [len(tokens_of(request)) for request in requests] == [60] * 12


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_padding_touches_nothing_but_the_dummies(tiny_model_dir: Path) -> None:
    """Three rows in a bucket of four. Every slot and block that is not theirs holds NaN, and does so afterwards."""
    params = {"max_tokens": 40, "ignore_eos": True}
    outputs = []
    for is_poisoned in (False, True):
        with gpu_llm(tiny_model_dir, block_size=256, launch_depth=0) as llm:
            engine, runner = llm._engine, llm._engine._runner
            requests = [submit(engine, prompt_of(20 + i, i), **params) for i in range(3)]
            for _ in range(5):
                engine.step()
            torch.cuda.synchronize()
            if is_poisoned:
                foreign = poison(runner)
            for _ in range(10):
                engine.step()
            torch.cuda.synchronize()
            if is_poisoned:
                assert runner.graphs is not None
                assert 4 in runner.graphs.captured
                for cache, indices in foreign:
                    assert bool(cache[indices].isnan().all())
            run_dry(engine)
            outputs.append([tokens_of(request) for request in requests])
    assert outputs[0] == outputs[1]


def poison(runner: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """NaN in every slot and block, but those of the live rows and the dummies; returns what was written where."""
    mirror, caches = runner._buffers.mirror, runner._caches
    rows = mirror.live[:3, 0].long()
    slots, blocks = mirror.slot[rows].tolist(), mirror.block_table[rows].flatten().tolist()
    foreign = []
    for used, group in (
        ({0, *slots}, (*caches.conv_state, *caches.ssm_state)),
        ({0, *blocks}, (*caches.keys, *caches.values)),
    ):
        for cache in group:
            indices = torch.tensor([i for i in range(len(cache)) if i not in used], device=cache.device)
            assert len(indices) > 0
            cache[indices] = float("nan")
            foreign.append((cache, indices))
    torch.cuda.synchronize()
    return foreign


@contextmanager
def counted_calls(calls: Counter[str]) -> Iterator[None]:
    """Counts CUDA API calls by name, between the begin and the end of the block."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with (
        profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler,
        record_function("counted"),
    ):
        yield
    events = list(profiler.events())
    span = next(event.time_range for event in events if event.name == "counted")
    for event in events:
        if event.name.startswith("cu") and span.start <= event.time_range.start < span.end:
            calls[event.name] += 1


class PlanCounter:
    """Counts what an engine launches."""

    def __init__(self, engine: Any) -> None:
        self.num_plans = self.num_packets = 0
        self._launch = engine.stages.launch
        engine.stages = replace(engine.stages, launch=self.launch)

    def launch(self, plan: Any) -> None:
        self.num_plans += 1
        self.num_packets += plan.packet_address != 0
        self._launch(plan)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.filterwarnings("ignore")  # the profiler's own
@pytest.mark.parametrize("launch_depth", [0, 1])
def test_a_decode_step_is_one_graph_launch_and_news_one_copy(tiny_model_dir: Path, launch_depth: int) -> None:
    with gpu_llm(tiny_model_dir, block_size=256, launch_depth=launch_depth) as llm:
        engine = llm._engine
        requests = [
            submit(engine, prompt_of(20 + i, i), max_tokens=150, ignore_eos=True, detokenize=False)
            for i in range(4)
        ]
        plans = PlanCounter(engine)
        for _ in range(10):
            engine.step()
        for num_aborted in (0, 2):
            for request in requests[:num_aborted]:
                engine.abort(request)
            plans.num_plans = plans.num_packets = 0
            calls: Counter[str] = Counter()
            with counted_calls(calls):
                for _ in range(20):
                    engine.step()
            assert plans.num_plans == 20
            assert plans.num_packets == (1 if num_aborted else 0)
            assert calls["cudaGraphLaunch"] == 20, calls
            assert calls["cudaMemcpyAsync"] == plans.num_packets, calls
            launches = [name for name in calls if "LaunchKernel" in name or "Memset" in name]
            assert not launches, calls
            assert not [name for name in calls if name in BLOCKING], calls
        engine.abort(requests[2])
        engine.abort(requests[3])
        drain(engine)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_capture_that_fails_says_why_and_leaves_eager_steps(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A product that asks the device for a number waits for it, which no capture can record."""
    greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with gpu_llm(tiny_model_dir, enforce_eager=True) as eager:
        expected = eager.generate([prompt_of(30)], greedy)[0].outputs[0].token_ids
    product = Linear.into

    def waiting(self: Linear, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        x.flatten()[0].item()
        return product(self, x, out)

    monkeypatch.setattr(Linear, "into", waiting)
    with caplog.at_level(logging.WARNING, logger="headway"), gpu_llm(tiny_model_dir) as llm:
        graphs = llm._engine._runner.graphs
        assert graphs is not None
        assert graphs.failure
        assert graphs.captured == ()
        assert graphs.failure in caplog.text
        assert llm.generate([prompt_of(30)], greedy)[0].outputs[0].token_ids == expected


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_closed_engines_give_their_memory_back(tiny_model_dir: Path) -> None:
    held = []
    for _ in range(3):
        with gpu_llm(tiny_model_dir) as llm:
            llm.generate([prompt_of(30)], SamplingParams(max_tokens=8))
        del llm
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # one for each stream that the BLAS ever ran on
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[0]
