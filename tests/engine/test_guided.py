"""Structured outputs: always of their form, the same at every launch depth, and nobody else waits for them."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headway.aio import AsyncLLM
from headway.engine.guided import MaskWorkers
from headway.errors import RequestError
from headway.llm import LLM
from headway.request import SamplingParams
from headway.sampling.grammar import GrammarCompiler
from headway.sampling.grammar_trial import GrammarError
from headway.text import Tokenizer
from tests.engine.driving import prompt_of, run_dry, submit, tokens_of
from tests.engine.fake_model import EOS, VOCAB_SIZE, expected_tokens, make_engine

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["x", "yy"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", 'may"be', "new\nline", "ü☃"]
FORMS: dict[str, tuple[Any, Callable[[str], bool]]] = {
    "json": (SCHEMA, lambda text: set(json.loads(text)) == {"name", "size"}),
    "regex": (r"[a-f]{2,5}-\d{3}", lambda text: bool(re.fullmatch(r"[a-f]{2,5}-\d{3}", text))),
    "choice": (CHOICES, lambda text: text in CHOICES),
    "grammar": ('start: "(" start ")" | "a"', lambda text: bool(re.fullmatch(r"\(*a\)*", text))),
}
GBNF = 'root ::= "x" [0-9] "y"'


def guided(kind: str, value: Any, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 200, "structured_outputs": {kind: value}, **fields})


@pytest.fixture(scope="module")
def outputs(tiny_model_dir: Path) -> dict[int, list[list[tuple[str, str | None]]]]:
    """(text, finish reason) of every completion, by launch depth; company and order of steps differ with it."""
    params = [
        guided(kind, value, temperature=temperature, seed=11, n=2 if temperature else 1)
        for kind, (value, _) in FORMS.items()
        for temperature in (0.0, 1.0)
    ]
    free = SamplingParams(temperature=1.0, seed=4, max_tokens=40, ignore_eos=True)
    found = {}
    for depth in (0, 1, 3):
        with LLM(tiny_model_dir, device="cpu", max_num_seqs=6, max_model_len=256, launch_depth=depth) as llm:
            results = llm.generate(["x = "] * len(params) + ["y"] * 3, [*params, free, free, free])
        found[depth] = [[(c.text, c.finish_reason) for c in result.outputs] for result in results]
    return found


def test_every_output_is_of_its_form(outputs: dict[int, list[list[tuple[str, str | None]]]]) -> None:
    forms = [check for _, check in FORMS.values() for _ in range(2)]
    for check, completions in zip(forms, outputs[0], strict=False):
        for text, reason in completions:
            assert reason in ("stop", "length")
            assert reason == "length" or check(text), text
    assert sum(reason == "stop" for completions in outputs[0][:-3] for _, reason in completions) >= 9


def test_every_depth_gives_the_same(outputs: dict[int, list[list[tuple[str, str | None]]]]) -> None:
    assert outputs[0] == outputs[1] == outputs[3]


@pytest.mark.parametrize(
    "form", [{"json": SCHEMA}, {"json": json.dumps(SCHEMA)}, {"json_object": True}], ids=str
)
def test_white_space_in_json_has_an_end(tiny_model_dir: Path, form: dict[str, Any]) -> None:
    """A small model that may write spaces between two tokens of JSON writes them to the end."""
    tokenizer = Tokenizer.from_dir(tiny_model_dir)
    compiler = GrammarCompiler(tokenizer.to_json(), tokenizer.vocab_size, [2])
    state = compiler.start(form)
    (opening,), (space,) = tokenizer.encode("{", False), tokenizer.encode(" ", False)
    state.advance(opening)
    for _ in range(128):
        state.advance(space)
    with pytest.raises(GrammarError):
        state.advance(space)


def test_a_schema_may_have_white_space_of_its_own(tiny_model_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(tiny_model_dir)
    compiler = GrammarCompiler(tokenizer.to_json(), tokenizer.vocab_size, [2])
    state = compiler.start({"json": {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}})
    state.advance(tokenizer.encode("{", False)[0])
    with pytest.raises(GrammarError):
        state.advance(tokenizer.encode(" ", False)[0])


def test_json_objects_and_gbnf(tiny_model_dir: Path) -> None:
    with LLM(tiny_model_dir, device="cpu", max_num_seqs=2, max_model_len=256) as llm:
        params = [
            guided("grammar", GBNF, temperature=1.0, seed=1),
            guided("json_object", True, max_tokens=30),
        ]
        gbnf, anything = llm.generate(["z", "z"], params)
    assert re.fullmatch("x[0-9]y", gbnf.outputs[0].text)
    assert anything.outputs[0].text.startswith("{")


class Countdown:
    """A grammar of token ids: each is the one before plus one; its masks come when `gate` is open."""

    def __init__(self, gate: threading.Event, length: int) -> None:
        self._gate, self._next, self._left = gate, 10, length

    def advance(self, token: int) -> None:
        if token != self._next:
            raise GrammarError(f"{token} after {self._next - 1}")
        self._next, self._left = token + 1, self._left - 1

    def mask(self) -> np.ndarray:
        self._gate.wait(30)
        bits = np.zeros((VOCAB_SIZE + 31) // 32 * 32, bool)
        bits[self._next if self._left else EOS] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)


class Compiler(GrammarCompiler):
    def __init__(self, gate: threading.Event, length: int = 5) -> None:
        self._gate, self._length = gate, length

    def start(self, form: object) -> Any:
        return Countdown(self._gate, self._length)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_nobody_waits_for_a_mask_that_does_not_come(depth: int) -> None:
    gate = threading.Event()
    engine = make_engine(launch_depth=depth, max_rows=4, grammars=Compiler(gate)).engine
    held = [submit(engine, prompt_of(5), structured_outputs={"regex": "a"}) for _ in range(2)]
    others = [submit(engine, prompt_of(6 + i, i)) for i in range(5)]
    while not all(other.is_finished for other in others):
        engine.step()
        engine.ledger.check_integrity()
    for i, other in enumerate(others):
        assert tokens_of(other) == expected_tokens(prompt_of(6 + i, i), 12)
    assert not any(request.completions[0].token_ids for request in held)
    assert engine.ledger.stats().num_held == 2
    gate.set()
    run_dry(engine)
    for request in held:
        assert tokens_of(request) == [10, 11, 12, 13, 14, EOS]
        assert request.completions[0].finish_reason == "stop"
    engine.close()


def test_masks_survive_eviction_and_slow_workers() -> None:
    for depth in (0, 2):
        gate = threading.Event()
        engine = make_engine(launch_depth=depth, max_step_tokens=6, grammars=Compiler(gate, 9)).engine
        requests = [
            submit(engine, prompt_of(9 + i), structured_outputs={"regex": "a"}, max_tokens=20)
            for i in range(3)
        ]
        crowd = [submit(engine, prompt_of(4, i), max_tokens=30, ignore_eos=True) for i in range(3)]
        for step in range(2000):
            if not engine.num_unfinished:
                break
            (gate.clear if step % 5 == 0 and any(not c.is_finished for c in crowd) else gate.set)()
            engine.step()
            engine.ledger.check_integrity()
            if step % 7 == 3:
                engine.ledger.evict(requests[step % 3].completions[0].ledger_id)
        gate.set()
        assert [tokens_of(request) for request in requests] == [[*range(10, 19), EOS]] * 3
        engine.close()


def test_an_abort_while_the_mask_is_computed() -> None:
    gate = threading.Event()
    engine = make_engine(launch_depth=1, grammars=Compiler(gate)).engine
    request = submit(engine, prompt_of(5), structured_outputs={"regex": "a"})
    engine.step()
    engine.abort(request)
    gate.set()
    run_dry(engine)
    assert request.completions[0].finish_reason == "abort"
    assert engine.ledger.stats().num_held == 0
    engine.close()


def test_a_grammar_that_fails_ends_its_output_alone() -> None:
    class Broken(Compiler):
        def start(self, form: object) -> Any:
            state = Countdown(self._gate, 5)
            state.advance = lambda token: (_ for _ in ()).throw(GrammarError("too complex"))  # type: ignore[method-assign]
            return state

    gate = threading.Event()
    gate.set()
    engine = make_engine(launch_depth=1, grammars=Broken(gate)).engine
    broken = submit(engine, prompt_of(5), structured_outputs={"regex": "a"})
    other = submit(engine, prompt_of(6))
    run_dry(engine)
    end = broken.completions[0]
    assert (end.finish_reason, end.stop_reason, tokens_of(broken)) == ("error", "grammar", [10])
    assert tokens_of(other) == expected_tokens(prompt_of(6), 12)
    engine.close()


def test_over_asyncio(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with AsyncLLM(tiny_model_dir, device="cpu", max_num_seqs=4, max_model_len=256) as llm:

            async def text(params: SamplingParams) -> str:
                return [output async for output in llm.generate("q", params)][-1].outputs[0].text

            texts = await asyncio.gather(
                *(text(guided("choice", CHOICES, temperature=1.0, seed=i)) for i in range(6))
            )
            assert set(texts) <= set(CHOICES)
            with pytest.raises(RequestError, match="regex"):
                await text(guided("regex", "[a-z"))

    asyncio.run(asyncio.wait_for(main(), 60))


DEEP: dict[str, Any] = {}
for _ in range(70):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"] * 4097}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a" * 200_000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "(" * 100 + "a" + ")" * 100}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": DEEP}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[" * 5000}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens"),
        ({"structured_outputs": {"regex": "a"}, "allowed_token_ids": [1]}, "allowed_token_ids"),
    ],
)
def test_forms_out_of_range_are_named(fields: dict[str, Any], parameter: str) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**fields)
    assert refused.value.parameter == parameter


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", "[a-z"),
        ("grammar", "start: nowhere"),
        ("json", '{"type": '),
        ("json", {"type": "no such type"}),
        ("json", "[1, 2]"),
    ],
)
def test_what_cannot_be_compiled_is_refused(tiny_model_dir: Path, kind: str, value: Any) -> None:
    with (
        LLM(tiny_model_dir, device="cpu", max_num_seqs=2, max_model_len=64) as llm,
        pytest.raises(RequestError) as refused,
    ):
        llm.generate("x", guided(kind, value))
    assert refused.value.parameter == "structured_outputs"
    assert refused.value.value == kind


@pytest.mark.parametrize(
    "pattern", ["((a{1,1000}){1,1000}){1,1000}", "(.*a.{200}){5}", "((a|b|c)*d(a|b|c|d){30}){10}"]
)
def test_catastrophic_patterns_end_in_bounds(tiny_model_dir: Path, pattern: str) -> None:
    with LLM(tiny_model_dir, device="cpu", max_num_seqs=2, max_model_len=128) as llm:
        output = llm.generate("x", guided("regex", pattern, max_tokens=60, temperature=1.0, seed=1))[0]
    assert output.outputs[0].finish_reason in ("stop", "length", "error")


def test_without_tokenizer_or_library_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path
) -> None:
    with pytest.raises(RequestError, match="without tokenizer"):
        MaskWorkers(make_engine().ledger, None).compile({"regex": "a"})
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"headway\[grammar\]"):
        GrammarCompiler("{}", 61, [1]).start({"regex": "a"})
