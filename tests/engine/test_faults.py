"""Faults in a step: a row's own end that row, others end the engine; nobody hangs and no memory is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.errors import EngineDeadError
from headway.llm import LLM
from headway.request import SamplingParams
from tests.engine.driving import prompt_of, run_dry, submit, tokens_of
from tests.engine.fake_model import POISON, expected_tokens, make_engine
from tests.engine.traces import drain

SETTINGS: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 128, "dtype": "float32"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


@pytest.mark.parametrize("launch_depth", range(5))
def test_bad_logits_end_their_own_row_at_any_depth(launch_depth: int) -> None:
    engine = make_engine(launch_depth=launch_depth, max_rows=3).engine
    poisoned = [submit(engine, [5 + i, POISON, 7]) for i in range(4)]
    healthy = [submit(engine, prompt_of(5, i)) for i in range(4)]
    run_dry(engine)
    drain(engine)
    assert {r.completions[0].finish_reason for r in poisoned} == {"error"}
    assert {r.completions[0].stop_reason for r in poisoned} == {"logits"}
    assert [tokens_of(r) for r in healthy] == [expected_tokens(prompt_of(5, i), 12) for i in range(4)]
    engine.close()


@pytest.mark.parametrize("launch_depth", [0, 2])
def test_a_state_of_nans_ends_its_row_and_leaves_its_memory_usable(
    tiny_model_dir: Path, device: str, launch_depth: int
) -> None:
    prompts = [prompt_of(20, i) for i in range(3)]
    params = {"max_tokens": 16, "ignore_eos": True}
    with LLM(tiny_model_dir, device=device, launch_depth=launch_depth, **SETTINGS) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
        engine, runner = llm._engine, llm._engine._runner
        drain(engine)
        requests = [submit(engine, prompt, **params) for prompt in prompts]
        for _ in range(5):
            engine.step()
        runner.staging.synchronize()
        mirror = runner._buffers.mirror
        slot = int(mirror.slot[int(mirror.live[1, 0])])
        for state in runner._caches.ssm_state:
            state[slot].fill_(float("nan"))
        if device == "cuda":
            torch.cuda.synchronize()
        run_dry(engine)
        drain(engine)
        assert [r.completions[0].finish_reason for r in requests] == ["length", "error", "length"]
        assert [tokens_of(requests[i]) for i in (0, 2)] == [expected[0], expected[2]]
        assert tokens_of(requests[1]) == expected[1][: len(tokens_of(requests[1]))]
        again = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
        assert again == expected


@pytest.mark.parametrize("launch_depth", [0, 2])
def test_out_of_memory_ends_the_engine_with_its_cause(
    tiny_model_dir: Path, device: str, launch_depth: int
) -> None:
    """A real allocation that cannot be: in a step of prompts, beside rows that decode."""
    with LLM(tiny_model_dir, device=device, launch_depth=launch_depth, **SETTINGS) as llm:
        engine, model = llm._engine, llm._engine._runner._model
        forward = model.forward

        def greedy_forward(batch: Any, caches: Any) -> torch.Tensor:
            if batch.num_decode_rows and batch.num_rows > batch.num_decode_rows:
                torch.empty(1 << 58, dtype=torch.uint8, device=device)
            return forward(batch, caches)

        model.forward = greedy_forward
        submit(engine, prompt_of(20), max_tokens=40, ignore_eos=True)
        for _ in range(3):
            engine.step()
        late = submit(engine, prompt_of(20, 1))
        with pytest.raises(EngineDeadError, match=r"(?i)memory"):
            run_dry(engine)
        with pytest.raises(EngineDeadError):
            engine.step()
    assert late.completions[0].finish_reason == "abort"  # ended by close()
    with LLM(tiny_model_dir, device=device, **SETTINGS) as llm:
        assert len(llm.generate([prompt_of(20)], GREEDY)[0].outputs[0].token_ids) == 16


DEVICE_FAULT = """
import sys
import torch
from headway import LLM, SamplingParams
from headway.errors import EngineDeadError

llm = LLM(sys.argv[1], device="cuda", launch_depth=int(sys.argv[2]), max_num_seqs=4, max_model_len=128)
params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
assert len(llm.generate([[5, 6, 7]], params)[0].outputs[0].token_ids) == 8
model = llm._engine._runner._model
forward = model.forward

def broken(batch, caches):
    hidden = forward(batch, caches)
    table = torch.zeros(4, device="cuda")
    table[torch.full((1,), 9, device="cuda")]  # beyond the table: the device stops at an assertion
    return hidden

model.forward = broken
try:
    llm.generate([[5, 6, 7]], params)
except EngineDeadError as error:
    print("DEAD", error)
llm.close()
print("CLOSED")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("launch_depth", [0, 1])
def test_a_fault_on_the_device_ends_the_engine_and_hangs_nobody(
    tiny_model_dir: Path, launch_depth: int
) -> None:
    """In a process of its own, since such a fault ends all use of the device by its process."""
    command = [sys.executable, "-c", DEVICE_FAULT, str(tiny_model_dir), str(launch_depth)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "DEAD the engine stopped: CUDA error" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "CLOSED" in done.stdout
