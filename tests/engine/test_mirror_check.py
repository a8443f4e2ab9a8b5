"""The debug mode that compares host and device: silent over whole traces, loud about one wrong number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headway.engine.stages import with_mirror_checks
from headway.errors import EngineDeadError
from headway.llm import LLM
from headway.ops import StepBuffers
from tests.engine.driving import prompt_of, run_dry, submit, tokens_of
from tests.engine.fake_model import Harness, make_engine
from tests.engine.test_depth import STOPS, LetterDetokenizer
from tests.engine.traces import play, random_trace

PARAMS = {
    "temperature": 0.8,
    "seed": 3,
    "presence_penalty": 0.5,
    "stop_token_ids": [60],
    "logit_bias": {5: 0.5},
    "ignore_eos": True,
    "max_tokens": 40,
}


def checked_engine(**settings: object) -> Harness:
    harness = make_engine(**settings)
    engine = harness.engine
    engine.stages = with_mirror_checks(engine.stages, engine.ledger, harness.runner.read_mirror)
    return harness


@pytest.mark.parametrize("launch_depth", range(4))
@pytest.mark.parametrize("num_slots", [0, 3])
def test_host_and_device_agree_after_every_commit(launch_depth: int, num_slots: int) -> None:
    """With evictions, aborts, stop strings and rewinds in flight; padded steps and plain ones."""
    num_evictions = 0
    for seed in range(4):
        harness = checked_engine(
            num_blocks=17,
            max_rows=3,
            num_slots=num_slots,
            max_step_tokens=13,
            launch_depth=launch_depth,
            row_buckets=(2, 3) if seed % 2 else (),
            make_detokenizer=lambda ids, skip: LetterDetokenizer(),
        )
        trace = random_trace(
            seed, prompt_of=prompt_of, max_prompt_len=40, max_tokens=20, stops=STOPS, has_rewinds=True
        )
        play(harness.engine, trace)
        num_evictions += harness.ledger.stats().num_evictions
        harness.engine.close()
    assert num_evictions > 0


FIELDS = {
    "last_token": "last_token",
    "num_computed": "num_computed",
    "slot": "slot",
    "stopped": "stopped",
    "block_table": "block table",
    "history": "history",
    "sampling": "sampling parameters",
    "stop_ids": "stop ids",
    "bias_ids": "biased tokens",
    "bias_values": "biases",
    "live": "live list",
}


class Planter:
    """Reads the mirror, once with a number that somebody has changed."""

    def __init__(self, harness: Harness, field: str) -> None:
        self._runner, self._field, self.is_planting = harness.runner, field, False
        stages, read = replace(harness.engine.stages, commit=harness.ledger.commit), self.read
        harness.engine.stages = with_mirror_checks(stages, harness.ledger, read)

    def read(self) -> StepBuffers:
        buffers = self._runner.read_mirror()
        if self.is_planting:
            tensor = getattr(buffers.mirror, self._field)
            row = 0 if self._field == "live" else int(buffers.mirror.live[1, 0])
            tensor.view(len(tensor), -1)[row, 0] += 1
        return buffers


@pytest.mark.parametrize("launch_depth", [0, 2])
@pytest.mark.parametrize("field", FIELDS)
def test_a_planted_corruption_is_found_and_named(field: str, launch_depth: int) -> None:
    harness = make_engine(launch_depth=launch_depth)
    engine, planter = harness.engine, Planter(harness, field)
    for i in range(3):
        submit(engine, prompt_of(6, i), **PARAMS)
    for _ in range(5):
        engine.step()
    planter.is_planting = True
    with pytest.raises(EngineDeadError, match=f"the device's {FIELDS[field]}"):
        engine.step()
    engine.close()


def test_the_setting_checks_a_real_model(tiny_model_dir: Path, device: str) -> None:
    settings = {"device": device, "max_num_seqs": 4, "max_model_len": 128, "check_mirror": True}
    for launch_depth in (0, 2):
        with LLM(tiny_model_dir, launch_depth=launch_depth, **settings) as llm:
            engine = llm._engine
            requests = [submit(engine, prompt_of(20 + i, i), ignore_eos=True) for i in range(6)]
            run_dry(engine)
            assert [len(tokens_of(request)) for request in requests] == [12] * 6
            submit(engine, prompt_of(20), max_tokens=30, ignore_eos=True)
            engine.step()
            engine.step()
            runner = engine._runner
            runner.staging.synchronize()
            mirror = runner._buffers.mirror
            mirror.block_table[int(mirror.live[0, 0]), 0] += 1
            if device == "cuda":
                torch.cuda.synchronize()
            with pytest.raises(EngineDeadError, match="block table"):
                engine.step()
