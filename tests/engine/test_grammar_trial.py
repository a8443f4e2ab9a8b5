"""A grammar that needs too much is ended and refused, and nobody else notices: the process is a real one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headway.aio import AsyncLLM
from headway.errors import OverloadedError, RequestError
from headway.sampling import grammar
from headway.sampling.grammar import GrammarCompiler
from headway.sampling.grammar_trial import GrammarError, GrammarTrial

pytest.importorskip("llguidance")

EASY = {"regex": "a{3}"}
# Optional properties: llguidance needs time that grows with the square of their number. 4,000 take seconds.
HARD = {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(4000)}}}
LESS_HARD = {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}}


def make_trial(folder: Path, **limits: Any) -> GrammarTrial:
    return GrammarTrial((folder / "tokenizer.json").read_text(), 2048, [2], **limits)


@pytest.fixture(scope="module")
def trial(tiny_model_dir: Path) -> Iterator[GrammarTrial]:
    found = make_trial(tiny_model_dir)
    yield found
    found.close()


def check(trial: GrammarTrial, form: Any) -> None:
    trial.check(json.dumps(form))


def pid_of(trial: GrammarTrial) -> int:
    assert trial._worker is not None
    return trial._worker.pid


@pytest.mark.parametrize("form", [HARD, {"regex": "("}, {"json": "{"}, {"grammar": "start: nowhere"}])
def test_what_is_refused_costs_nobody_else(trial: GrammarTrial, form: Any) -> None:
    check(trial, EASY)
    pid = pid_of(trial)
    with pytest.raises(GrammarError, match="needs more than 1 s" if form is HARD else None):
        check(trial, form)
    check(trial, EASY)
    check(trial, LESS_HARD)
    assert pid_of(trial) == pid


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ({"grammar": "root :::= "}, "Expected ::="),
        ({"grammar": "root ::= nowhere"}, "Rule 'nowhere' not found"),
        ({"grammar": ""}, "No 'root' rule"),
        ({"json": {"$ref": "#"}}, "NoExtension"),  # no text fulfils it
    ],
)
def test_what_is_wrong_with_a_form_is_told(
    trial: GrammarTrial, tiny_model_dir: Path, form: Any, why: str
) -> None:
    with pytest.raises(GrammarError, match=why) as told:
        check(trial, form)
    assert "it needs more than" not in str(told.value)
    untried = GrammarCompiler((tiny_model_dir / "tokenizer.json").read_text(), 2048, [2])
    with pytest.raises(RequestError, match=why):
        untried.start(form)


@pytest.mark.parametrize("limits", [{"cpu_s": 0.001}, {"memory_bytes": 1 << 20}])
def test_both_limits_hold(tiny_model_dir: Path, trial: GrammarTrial, limits: dict[str, Any]) -> None:
    """The very form that the usual limits let through."""
    check(trial, LESS_HARD)
    tight = make_trial(tiny_model_dir, **limits)
    with pytest.raises(GrammarError, match="it needs more than"):
        check(tight, LESS_HARD)
    tight.close()


def test_a_worker_that_was_ended_is_replaced(trial: GrammarTrial) -> None:
    check(trial, EASY)
    os.kill(pid := pid_of(trial), signal.SIGKILL)
    check(trial, EASY)
    assert pid_of(trial) != pid
    trial.close()
    trial.close()
    check(trial, EASY)


def test_without_a_worker_the_caller_may_come_again(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(OverloadedError):
        check(make_trial(tiny_model_dir), EASY)


class Asked(GrammarTrial):
    """Says what it was asked, and waits for `gate`."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def check(self, form_json: str) -> None:
        self.keys.append(form_json)
        assert self.gate.wait(30)
        if "bad" in form_json:
            raise GrammarError("not that one")

    def close(self) -> None: ...


def make_compiler(folder: Path) -> tuple[GrammarCompiler, Asked]:
    asked = Asked()
    return GrammarCompiler((folder / "tokenizer.json").read_text(), 2048, [2], asked), asked


def test_each_form_is_tried_once(tiny_model_dir: Path) -> None:
    compiler, asked = make_compiler(tiny_model_dir)
    for _ in range(3):
        compiler.start(EASY)
        with pytest.raises(RequestError, match="what can be compiled: not that one"):
            compiler.start({"regex": "bad"})
    assert len(asked.keys) == 2


def test_the_vocabulary_is_read_beforehand(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, _ = make_compiler(tiny_model_dir)
    compiler.prepare()
    monkeypatch.delattr(grammar, "make_tokenizer")
    compiler.prepare()
    compiler.start(EASY)


def test_an_engine_for_strangers_has_read_it(tiny_model_dir: Path) -> None:
    llm = AsyncLLM(tiny_model_dir, device="cpu", max_num_seqs=1, max_model_len=64)
    compiler = llm._parts.engine._masks._compiler
    assert compiler is not None
    assert compiler._tokenizer is not None
    asyncio.run(llm.close())


def test_who_compiles_holds_nobody_up_who_has_compiled(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "MAX_WAIT_S", 0.2)
    compiler, asked = make_compiler(tiny_model_dir)
    compiler.start(EASY)
    asked.gate.clear()
    thread = threading.Thread(target=compiler.start, args=({"regex": "slow"},))
    thread.start()
    compiler.start(EASY)
    with pytest.raises(OverloadedError):
        compiler.start({"regex": "another"})
    asked.gate.set()
    thread.join()
    compiler.start({"regex": "another"})


def test_what_is_kept_is_bounded(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MAX_KEPT_CHARS", 200)
    compiler, asked = make_compiler(tiny_model_dir)
    forms = [{"regex": f"{i}{'a' * 60}"} for i in range(5)]
    for form in forms:
        compiler.start(form)
    for form in (forms[4], forms[3], forms[0]):
        compiler.start(form)
    assert [json.loads(key) for key in asked.keys] == [*forms, forms[0]]
    compiler.start({"regex": "b" * 500})
    compiler.start({"regex": "b" * 500})
    assert len(asked.keys) == 7
