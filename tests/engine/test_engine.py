"""The loop over the fake model: whatever the batch, the chunking or the memory, a request's tokens are its own."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from headway.errors import CapacityError, EngineDeadError, RequestError
from tests.engine.driving import prompt_of, run_dry, submit, tokens_of
from tests.engine.fake_model import POISON, VOCAB_SIZE, expected_tokens, make_engine

PROMPT_LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31)


@pytest.mark.parametrize("launch_depth", [0, 1, 2])
@pytest.mark.parametrize("max_step_tokens", [8, 9, 32])
def test_a_batch_gives_what_each_prompt_gives_alone(launch_depth: int, max_step_tokens: int) -> None:
    engine = make_engine(launch_depth=launch_depth, max_step_tokens=max_step_tokens).engine
    requests = [submit(engine, prompt_of(length, length)) for length in PROMPT_LENGTHS]
    run_dry(engine)
    for length, request in zip(PROMPT_LENGTHS, requests, strict=True):
        assert tokens_of(request) == expected_tokens(prompt_of(length, length), 12)


def test_chunked_and_whole_prompts_agree() -> None:
    whole, chunked = make_engine(max_step_tokens=64), make_engine(max_step_tokens=8)
    outputs = []
    for harness in (whole, chunked):
        request = submit(harness.engine, prompt_of(31))
        run_dry(harness.engine)
        outputs.append(tokens_of(request))
    assert outputs[0] == outputs[1] == expected_tokens(prompt_of(31), 12)
    assert max(whole.model.step_sizes) == 31
    assert max(chunked.model.step_sizes) == 8


@pytest.mark.parametrize("launch_depth", [0, 1])
def test_tiny_pools_evict_and_lose_nothing(launch_depth: int) -> None:
    tight = make_engine(num_blocks=18, max_rows=6, launch_depth=launch_depth)
    requests = [submit(tight.engine, prompt_of(13, i), max_tokens=40, ignore_eos=True) for i in range(6)]
    run_dry(tight.engine)
    assert tight.ledger.stats().num_evictions > 0
    for i, request in enumerate(requests):
        assert tokens_of(request) == expected_tokens(prompt_of(13, i), 40, stops_at=None)


@pytest.mark.parametrize("launch_depth", [0, 1])
def test_eviction_does_not_change_samples(launch_depth: int) -> None:
    outputs = []
    for num_blocks in (18, 200):
        harness = make_engine(num_blocks=num_blocks, max_rows=6, launch_depth=launch_depth)
        params = {
            "temperature": 1.0,
            "top_p": 0.9,
            "max_tokens": 40,
            "ignore_eos": True,
            "presence_penalty": 0.5,
        }
        requests = [submit(harness.engine, prompt_of(13, i), seed=i, **params) for i in range(6)]
        run_dry(harness.engine)
        outputs.append([tokens_of(request) for request in requests])
        assert (harness.ledger.stats().num_evictions > 0) == (num_blocks == 18)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("trace", range(24))
def test_random_traces(trace: int) -> None:
    """Submissions, aborts, pauses and evictions at random over small pools: whoever ends by itself ends right."""
    draws = random.Random(trace)
    harness = make_engine(
        num_blocks=draws.choice([17, 24, 60]),
        max_rows=draws.choice([1, 3, 6]),
        num_slots=draws.choice([1, 2, 6]),
        max_step_tokens=draws.choice([6, 13, 64]),
        launch_depth=trace % 4,
    )
    ledger, requests = harness.ledger, []
    for _ in range(draws.randrange(40, 120)):
        if len(requests) < 14 and draws.random() < 0.4:
            prompt = prompt_of(draws.randrange(1, 40), draws.randrange(50))
            priority, max_tokens = draws.randrange(3), draws.randrange(1, 22)
            requests.append(submit(harness.engine, prompt, priority=priority, max_tokens=max_tokens))
        if requests and draws.random() < 0.2:
            request = draws.choice(requests)
            action = draws.choice([ledger.pause, ledger.resume, ledger.evict, None])
            if action is None:
                harness.engine.abort(request)
            else:
                action(request.completions[0].ledger_id)
        harness.engine.step()
        ledger.check_integrity()
    for request in requests:
        ledger.resume(request.completions[0].ledger_id)
    run_dry(harness.engine)
    for request in requests:
        expected = expected_tokens(request.prompt_token_ids, request.params.max_tokens or 0)
        tokens = tokens_of(request)
        assert tokens == (
            expected[: len(tokens)] if request.completions[0].finish_reason == "abort" else expected
        )


def test_lower_priority_values_run_first() -> None:
    engine = make_engine(max_rows=1).engine
    late = submit(engine, prompt_of(4, 1), priority=5)
    soon = submit(engine, prompt_of(4, 2), priority=-5)
    while not soon.is_finished:
        engine.step()
    assert tokens_of(late) == []
    run_dry(engine)
    assert tokens_of(late) == expected_tokens(prompt_of(4, 1), 12)


def test_fewer_slots_than_rows_only_wait() -> None:
    harness = make_engine(num_slots=2)
    requests = [submit(harness.engine, prompt_of(6, i)) for i in range(7)]
    run_dry(harness.engine)
    assert [tokens_of(r) for r in requests] == [expected_tokens(prompt_of(6, i), 12) for i in range(7)]


def test_everything_returns_to_the_pools() -> None:
    harness = make_engine()
    for i in range(5):
        submit(harness.engine, prompt_of(9, i))
    run_dry(harness.engine)
    stats = harness.ledger.stats()
    assert (stats.blocks_free, stats.slots_free) == (stats.blocks_total, stats.slots_total)


@pytest.mark.parametrize("launch_depth", [0, 1])
def test_abort_in_the_middle_leaves_the_others(launch_depth: int) -> None:
    engine = make_engine(launch_depth=launch_depth).engine
    requests = [submit(engine, prompt_of(6, i), max_tokens=20, ignore_eos=True) for i in range(4)]
    for _ in range(6):
        engine.step()
    engine.abort(requests[1])
    engine.abort(requests[1])
    num_tokens = len(tokens_of(requests[1]))
    run_dry(engine)
    assert requests[1].completions[0].finish_reason == "abort"
    assert len(tokens_of(requests[1])) == num_tokens < 20
    for i in (0, 2, 3):
        assert tokens_of(requests[i]) == expected_tokens(prompt_of(6, i), 20, stops_at=None)


def test_abort_before_the_first_step() -> None:
    engine = make_engine().engine
    request = submit(engine, prompt_of(4))
    engine.abort(request)
    assert request.is_finished
    assert engine.num_unfinished == 0
    assert tokens_of(request) == []


def test_bad_logits_end_their_own_request() -> None:
    engine = make_engine().engine
    poisoned = submit(engine, [5, POISON, 7])
    healthy = submit(engine, prompt_of(5))
    run_dry(engine)
    assert poisoned.completions[0].finish_reason == "error"
    assert tokens_of(poisoned) == []
    assert tokens_of(healthy) == expected_tokens(prompt_of(5), 12)


class LetterDetokenizer:
    """Every token is two letters."""

    def append(self, token_id: int) -> str:
        return chr(ord("a") + token_id // 26) + chr(ord("A") + token_id % 26)

    def extend(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.append, token_ids))

    def finish(self) -> str:
        return ""


@pytest.mark.parametrize("launch_depth", [0, 1, 3])
@pytest.mark.parametrize("num_until_stop", [1, 5, 12])
def test_stop_strings_end_their_request_at_any_depth(launch_depth: int, num_until_stop: int) -> None:
    """Steps in flight when the host finds the string are void; at 12 tokens length and string come together."""
    harness = make_engine(launch_depth=launch_depth, make_detokenizer=lambda ids, skip: LetterDetokenizer())
    tokens = expected_tokens(prompt_of(5), 12, stops_at=None)
    text = "".join(map(LetterDetokenizer().append, tokens))
    stop = text[2 * num_until_stop - 3 : 2 * num_until_stop] if num_until_stop > 1 else text[1:2]
    num_expected = (text.index(stop) + len(stop) + 1) // 2
    stopped = submit(harness.engine, prompt_of(5), stop=stop, ignore_eos=True)
    other = submit(harness.engine, prompt_of(6), max_tokens=20, ignore_eos=True)
    run_dry(harness.engine)
    output = stopped.output().outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == tokens[:num_expected]
    assert output.text == text[: text.index(stop)]
    assert tokens_of(other) == expected_tokens(prompt_of(6), 20, stops_at=None)
    assert not harness.ledger.has_unfinished


class BrokenDetokenizer(LetterDetokenizer):
    def append(self, token_id: int) -> str:
        raise ValueError("no such letter")


def test_text_that_cannot_be_built_ends_its_own_request() -> None:
    made = iter([BrokenDetokenizer(), LetterDetokenizer()])
    harness = make_engine(make_detokenizer=lambda ids, skip: next(made))
    broken = submit(harness.engine, prompt_of(5), stop="never", ignore_eos=True)
    healthy = submit(harness.engine, prompt_of(5), stop="never", ignore_eos=True)
    run_dry(harness.engine)
    assert broken.output().outputs[0].finish_reason == "error"
    assert tokens_of(healthy) == expected_tokens(prompt_of(5), 12, stops_at=None)
    assert not harness.ledger.has_unfinished


@pytest.mark.parametrize(
    ("prompt", "params", "parameter"),
    [
        ([], {}, "prompt"),
        ([VOCAB_SIZE], {}, "prompt_token_ids"),
        ([-1], {}, "prompt_token_ids"),
        ([1.5], {}, "prompt_token_ids"),
        ([3, True], {}, "prompt_token_ids"),
        ([2**70], {}, "prompt_token_ids"),
        (np.array([3.0]), {}, "prompt_token_ids"),
        (np.array([[3]]), {}, "prompt_token_ids"),
        ([5] * 64, {}, "prompt"),
        ([5], {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ([5], {"stop_token_ids": [-1]}, "stop_token_ids"),
        ([5], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ([5], {"logprobs": 6}, "logprobs"),
        ([5], {"temperature": float("nan")}, "temperature"),
    ],
)
def test_bad_requests_name_the_parameter_and_disturb_nobody(
    prompt: list[int], params: dict[str, object], parameter: str
) -> None:
    engine = make_engine().engine
    healthy = submit(engine, prompt_of(5))
    engine.step()
    with pytest.raises(RequestError) as caught:
        submit(engine, prompt, **params)
    assert caught.value.parameter == parameter
    run_dry(engine)
    assert tokens_of(healthy) == expected_tokens(prompt_of(5), 12)


@pytest.mark.parametrize("kind", [tuple, np.array, lambda ids: [np.int32(token) for token in ids]])
def test_token_ids_of_any_integer_kind_are_taken(kind: Callable[[list[int]], Sequence[int]]) -> None:
    engine = make_engine().engine
    request = submit(engine, kind(prompt_of(5)))
    run_dry(engine)
    assert tokens_of(request) == expected_tokens(prompt_of(5), 12)


def test_a_request_that_can_never_fit_is_refused_whole() -> None:
    engine = make_engine(num_blocks=4).engine
    with pytest.raises(CapacityError):
        submit(engine, prompt_of(30), temperature=1.0, n=3)
    assert engine.num_unfinished == 0
    assert not engine.ledger.has_unfinished


def test_a_fault_kills_the_engine_with_its_cause() -> None:
    engine = make_engine(fail_at=3).engine
    submit(engine, prompt_of(5), ignore_eos=True)
    with pytest.raises(EngineDeadError, match="caught fire"):
        run_dry(engine)
    for call in (engine.step, lambda: submit(engine, prompt_of(2))):
        with pytest.raises(EngineDeadError) as caught:
            call()
        assert "caught fire" in str(caught.value.__cause__)
    engine.close()


def test_close_ends_requests_and_is_legal_twice() -> None:
    engine = make_engine().engine
    request = submit(engine, prompt_of(5))
    engine.step()
    engine.close()
    engine.close()
    assert request.completions[0].finish_reason == "abort"
    with pytest.raises(EngineDeadError, match="closed"):
        engine.step()


def test_an_idle_engine_steps_to_nothing() -> None:
    assert make_engine().engine.step() == []


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("launch_depth", [0, 2])
def test_an_interrupt_comes_between_steps(launch_depth: int) -> None:
    """SIGINT is raised inside a step; the step is carried through first, and the engine goes on."""
    engine = make_engine(launch_depth=launch_depth).engine
    request = submit(engine, prompt_of(5), ignore_eos=True)
    engine.step()
    stages = engine.stages

    def interrupted(plan: object) -> None:
        signal.raise_signal(signal.SIGINT)
        stages.launch(plan)

    engine.stages = replace(stages, launch=interrupted)
    num_before = len(tokens_of(request))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert len(tokens_of(request)) == num_before + 1
    engine.stages = stages
    run_dry(engine)
    assert tokens_of(request) == expected_tokens(prompt_of(5), 12, stops_at=None)
