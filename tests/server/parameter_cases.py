"""Every parameter of the generating endpoints at, within and beyond its limits, with what it must be answered with.

The limits are written down here a second time, as docs/features.md has them, and not taken from the code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

VOCAB_SIZE = 2048
MAX_MODEL_LEN = 512
MAX_TOKENS = 2  # asked for where nothing else is said
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BASE: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": [5, 6, 7], "max_tokens": MAX_TOKENS},
    CHAT: {"messages": [{"role": "user", "content": "x"}], "max_tokens": MAX_TOKENS},
}
HUGE = (-(2**63) - 1, 2**63, 2**64, 2**70, 10**30)
NO_NUMBERS = (True, "1", [], {})
LITERALS = ("NaN", "Infinity", "-Infinity", "1e400", "-1e400")  # which JSON does not have, or a double


@dataclass(frozen=True)
class Raw:
    """JSON as it stands."""

    text: str


@dataclass(frozen=True)
class Case:
    """A request, and the field that a 400 must name; None: it is answered, "": a 400 that may name any."""

    path: str
    fields: dict[str, Any]
    wrong: str | None

    @property
    def body(self) -> bytes:
        fields = {**BASE[self.path], **self.fields}
        return ("{" + ", ".join(f"{json.dumps(k)}: {_text(v)}" for k, v in fields.items()) + "}").encode()


def _text(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return json.dumps(value)


@dataclass(frozen=True)
class Range:
    """Of a number; `others` are fields that it needs beside it."""

    name: str
    low: float
    high: float
    is_low_open: bool = False
    others: tuple[tuple[str, Any], ...] = ()
    also: tuple[int, ...] = ()  # that are accepted out of the range
    path: str | None = None  # of the only endpoint that has it

    def is_within(self, value: float) -> bool:
        is_above = self.low < value if self.is_low_open else self.low <= value
        return value in self.also or (is_above and value <= self.high)

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if self.path else (COMPLETIONS, CHAT)


SAMPLED = (("temperature", 1),)
INTEGERS = (
    Range("n", 1, 1024, others=SAMPLED),
    Range("best_of", 1, 1, path=COMPLETIONS),
    Range("logprobs", 0, 20, path=COMPLETIONS),
    Range("top_logprobs", 0, 20, others=(("logprobs", True),), path=CHAT),
    Range("prompt_logprobs", 0, 20),
    Range("max_tokens", 1, MAX_MODEL_LEN - 3, path=COMPLETIONS),
    Range("max_completion_tokens", 1, 64, path=CHAT),
    Range("min_tokens", 0, MAX_TOKENS),
    Range("top_k", -1, 2**31 - 1),
    Range("seed", -(2**63), 2**64 - 1),
    Range("truncate_prompt_tokens", 1, 2**31 - 1, also=(-1,)),
    Range("priority", -(2**31), 2**31 - 1),
)
FLOATS = (
    Range("temperature", 0, 2),
    Range("top_p", 0, 1, is_low_open=True),
    Range("min_p", 0, 1),
    Range("presence_penalty", -2, 2),
    Range("frequency_penalty", -2, 2),
    Range("repetition_penalty", 0, 100, is_low_open=True),
    Range("logit_bias", -100, 100),  # of token 5
)
TOKEN_IDS = (
    *(
        -(2**63),
        -(2**31),
        -1,
        0,
        1,
        VOCAB_SIZE - 1,
        VOCAB_SIZE,
        VOCAB_SIZE + 31,
        2**31 - 1,
        2**31,
        2**32,
        2**63,
    ),
    *(2**64, 10**30, 1e30, 1.5, True, False, None, "1", "x", [], {}),
)
ID_FIELDS = ("prompt", "allowed_token_ids", "stop_token_ids", "logit_bias")


def cases() -> Iterator[Case]:
    """Each whole and streamed."""
    for case in (*_integers(), *_floats(), *_token_ids(), *_counts()):
        yield case
        yield Case(case.path, {**case.fields, "stream": True}, case.wrong)


def _integers() -> Iterator[Case]:
    for each in INTEGERS:
        low, high = int(each.low), int(each.high)
        values = {
            low - 2,
            low - 1,
            low,
            low + 1,
            high - 1,
            high,
            high + 1,
            -1,
            0,
            1,
            *HUGE,
            -(2**31) - 1,
            2**31,
        }
        is_slow = each.name == "n"  # a thousand completions once, not six times
        for path in each.paths:
            for value in sorted(values - {high - 1} if is_slow else values):
                if each.name == "max_completion_tokens" and value > high:
                    continue  # how much of the context is left depends on the template
                yield _number(each, path, value, each.is_within(value))
            for wrong in (*NO_NUMBERS, 1.5, *map(Raw, LITERALS)):
                yield _number(each, path, wrong, is_fine=False)
            yield _number(each, path, None, is_fine=True)


def _floats() -> Iterator[Case]:
    for each in FLOATS:
        beyond = (math.nextafter(each.low, -math.inf), math.nextafter(each.high, math.inf))
        within = (each.low, math.nextafter(each.low, math.inf), (each.low + each.high) / 2, each.high)
        tiny = (-0.0, 5e-324, -5e-324, 1e-300, 1e308, -1e308, 1, 0)
        for path in each.paths:
            for value in (*beyond, *within, *tiny, *HUGE):
                yield _number(each, path, value, each.is_within(value))
            for wrong in (*NO_NUMBERS, *map(Raw, LITERALS)):
                yield _number(each, path, wrong, is_fine=False)
            yield _number(each, path, None, is_fine=each.name != "logit_bias")


def _number(each: Range, path: str, value: Any, is_fine: bool) -> Case:
    given = {"5": value} if each.name == "logit_bias" else value
    wrong = None if is_fine else "" if isinstance(value, Raw) else each.name
    return Case(path, {**dict(each.others), each.name: given}, wrong)


def _token_ids() -> Iterator[Case]:
    for name in ID_FIELDS:
        for path in (COMPLETIONS,) if name == "prompt" else (COMPLETIONS, CHAT):
            for value in TOKEN_IDS:
                if name == "logit_bias":  # whose keys are text in any case
                    key = str(value)
                    is_id = key.isdigit() and int(key) < VOCAB_SIZE
                    yield Case(path, {name: {key: 1}}, None if is_id else name)
                    continue
                is_fine = type(value) is int and 0 <= value < VOCAB_SIZE
                is_text = name == "prompt" and type(value) is str  # a list of prompts
                yield Case(path, {name: [value]}, None if is_fine or is_text else name)
                yield Case(path, {name: [5, value]}, None if is_fine else name)


def _counts() -> Iterator[Case]:
    words = [{"role": "user", "content": "x"}]
    tool = {"type": "function", "function": {"name": "f"}}
    for path in (COMPLETIONS, CHAT):
        for num, wrong in ((0, None), (1, None), (64, None), (65, "stop")):
            yield Case(path, {"stop": ["zzz"] * num}, wrong)
        for num, wrong in ((0, "stop"), (1, None), (1024, None), (1025, "stop")):
            yield Case(path, {"stop": "~" * num}, wrong)
            yield Case(path, {"stop": ["~" * num]}, wrong)
            yield Case(path, {"bad_words": ["~" * num]} if num != 1024 else {}, wrong and "bad_words")
        for num, wrong in ((1, None), (2048, None), (2**16 + 1, "allowed_token_ids")):
            yield Case(path, {"allowed_token_ids": [i % VOCAB_SIZE for i in range(num)]}, wrong)
        yield Case(path, {"allowed_token_ids": []}, "allowed_token_ids")
        for num, wrong in ((0, None), (1, None), (1000, "stop_token_ids")):
            yield Case(path, {"stop_token_ids": list(range(num))}, wrong)
        for num, wrong in ((0, None), (300, None), (2000, "logit_bias")):
            yield Case(path, {"logit_bias": {str(i): 1 for i in range(num)}}, wrong)
        for name in ("model", "request_id", "cache_salt"):
            yield Case(path, {name: "x" * 513}, name)
    for num, wrong in ((1, None), (1024, None), (1025, "prompt")):
        yield Case(COMPLETIONS, {"prompt": [[5]] * num, "max_tokens": 1}, wrong)
    for num, wrong in (
        (0, "prompt"),
        (MAX_MODEL_LEN - MAX_TOKENS, None),
        (MAX_MODEL_LEN - MAX_TOKENS + 1, ""),
    ):
        yield Case(COMPLETIONS, {"prompt": [5] * num}, wrong)
    for num, wrong in ((0, "messages"), (1, None), (4097, "messages")):
        yield Case(CHAT, {"messages": words * num}, wrong)
    for num, wrong in ((0, None), (257, "tools")):
        yield Case(CHAT, {"tools": [tool] * num}, wrong)
