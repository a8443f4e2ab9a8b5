"""Set back at any point, a request goes on as if it had never gone further: tokens, text, logprobs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from headway.engine.completion import Request
from headway.errors import RequestError
from headway.llm import LLM
from headway.request import SamplingParams
from tests.engine.driving import prompt_of, run_dry, submit, tokens_of
from tests.engine.fake_model import make_engine
from tests.engine.test_depth import LetterDetokenizer
from tests.engine.traces import drain, outcome_of, rewind

PARAMS = {
    "max_tokens": 14,
    "ignore_eos": True,
    "temperature": 0.9,
    "seed": 7,
    "logprobs": 2,
    "presence_penalty": 0.5,
}


def letters(ids: object, skip: object) -> LetterDetokenizer:
    return LetterDetokenizer()


@pytest.mark.parametrize("launch_depth", range(5))
def test_a_request_set_back_at_any_point_gives_what_it_gives_undisturbed(launch_depth: int) -> None:
    """Sampled, with penalties over its history; the steps in flight are void."""
    harness = make_engine(num_slots=0, launch_depth=launch_depth, make_detokenizer=letters)
    engine = harness.engine

    def run(num_steps: int, num_tokens: int) -> object:
        request = submit(engine, prompt_of(5), stop=["never"], **PARAMS)
        for _ in range(num_steps):
            engine.step()
        if num_steps:
            num_before = len(tokens_of(request))
            assert engine.rewind(request.completions[0], num_tokens)
            assert len(tokens_of(request)) == num_before - num_tokens
            engine.ledger.check_integrity()
        run_dry(engine)
        drain(engine)
        return outcome_of(request), request.completions[0].cumulative_logprob

    expected = run(0, 0)
    for num_steps in range(1, 13):
        for num_tokens in range(num_steps):
            assert run(num_steps, num_tokens) == expected, (num_steps, num_tokens)
    engine.close()


def test_what_was_shown_or_never_was_cannot_be_dropped() -> None:
    harness = make_engine(num_slots=0, make_detokenizer=letters)
    request = submit(harness.engine, prompt_of(5), **PARAMS)
    completion = request.completions[0]
    for _ in range(6):
        harness.engine.step()
    assert completion.take_delta() is not None
    for _ in range(3):
        harness.engine.step()
    for num_tokens in (-1, 4, 99):
        with pytest.raises(RequestError) as caught:
            harness.engine.rewind(completion, num_tokens)
        assert (caught.value.parameter, caught.value.value) == ("num_positions", num_tokens)
    assert harness.engine.rewind(completion, 3)
    shown = completion.take_delta()
    assert shown is None
    run_dry(harness.engine)
    assert not harness.engine.rewind(completion, 1)
    assert len(tokens_of(request)) == 14


def test_state_kept_in_place_refuses_and_goes_on() -> None:
    harness = make_engine(launch_depth=2)
    requests = [submit(harness.engine, prompt_of(5), **PARAMS) for _ in range(2)]
    for _ in range(6):
        harness.engine.step()
    with pytest.raises(RequestError) as caught:
        harness.engine.rewind(requests[0].completions[0], 1)
    assert caught.value.parameter == "num_positions"
    run_dry(harness.engine)
    assert tokens_of(requests[0]) == tokens_of(requests[1])


@pytest.fixture(scope="module")
def attention_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of attention alone, of random weights."""
    folder = tmp_path_factory.mktemp("attention")
    settings = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def each_llm(folder: Path, device: str) -> Iterator[LLM]:
    settings = {"device": device, "dtype": "float32", "max_num_seqs": 4, "max_model_len": 128}
    for launch_depth in (0, 1, 3):
        with LLM(
            folder, load_format="dummy", launch_depth=launch_depth, check_mirror=True, **settings
        ) as llm:
            yield llm


def test_a_model_of_attention_alone_goes_back_on_every_device(attention_dir: Path, device: str) -> None:
    """At every step, by every number of tokens, and beside a request that is left alone."""
    for llm in each_llm(attention_dir, device):
        engine = llm._engine
        params = {**PARAMS, "detokenize": False, "logprobs": None}
        expected = llm.generate([prompt_of(20)], SamplingParams(**params))[0].outputs[0].token_ids
        for num_steps in range(2, 13, 2 if device == "cpu" else 5):
            for num_tokens in range(0, num_steps, 1 if num_steps < 6 else 4):
                requests = [submit(engine, prompt_of(20), **params) for _ in range(2)]
                for _ in range(num_steps):
                    engine.step()
                assert engine.rewind(requests[0].completions[0], num_tokens)
                run_dry(engine)
                drain(engine)
                assert [tokens_of(request) for request in requests] == [expected] * 2, (num_steps, num_tokens)


MAX_REWIND = 6


@pytest.mark.parametrize(
    ("launch_depth", "stride"),
    [(0, 9), (1, 17), (3, 17), *(pytest.param(depth, 1, marks=pytest.mark.long) for depth in (0, 1, 3))],
)
def test_a_windowed_state_goes_back_from_every_phase(
    tiny_model_dir: Path, device: str, launch_depth: int, stride: int
) -> None:
    """Two windows and what lies around them, from a prompt that ends inside one; a row for each way back."""
    settings = {"device": device, "max_num_seqs": MAX_REWIND + 2, "max_model_len": 128, "check_mirror": True}
    window = {"state_window": 16, "max_rewind_tokens": MAX_REWIND}
    if device == "cuda":
        stride = 7 * stride
    with LLM(tiny_model_dir, launch_depth=launch_depth, **settings, **window) as llm:
        engine = llm._engine

        def start(num_rows: int) -> list[Request]:
            params = {"max_tokens": 40, "ignore_eos": True, "presence_penalty": 0.5}
            return [submit(engine, prompt_of(21), **params) for _ in range(num_rows)]

        (undisturbed,) = start(1)
        run_dry(engine)
        drain(engine)
        expected = tokens_of(undisturbed)
        for num_steps in range(2, 37, stride):
            rows = start(MAX_REWIND + 1)
            for _ in range(num_steps):
                engine.step()
            num_done = 0
            for num_positions, request in enumerate(rows):
                num_done += rewind(engine, request, num_positions)
            # The prompt's own state is the floor; steps in flight count as positions.
            assert num_done == min(MAX_REWIND - launch_depth + 1, num_steps)
            run_dry(engine)
            drain(engine)
            assert [tokens_of(request) for request in rows] == [expected] * len(rows), num_steps
