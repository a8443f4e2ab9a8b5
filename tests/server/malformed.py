"""Requests that are wrong in one way or another, made from a seed: HTTP or JSON that is none, values out of range."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
NUMBER_FIELDS = ["n", "temperature", "top_p", "min_p", "max_tokens", "min_tokens", "presence_penalty"]
WRONG_NUMBERS = [-(2**63) - 1, -(2**31), 10**6, 2**64, 1e300, -1e300, "1", [], {}, [1], "NaN", "\x00", False]
STRUCTURES: list[Any] = [
    "stop",
    "logit_bias",
    "stop_token_ids",
    "stream_options",
    "response_format",
    "structured_outputs",
]
WRONG_STRUCTURES = [3, "", [[]], [None], {"a": {"b": []}}, [-1], [2**70], True, {"type": []}, ["\ud83d"]]


def malformed(rng: random.Random) -> bytes:
    """One request whose only right answer is a 4xx, or no answer at all."""
    makers: list[Callable[[random.Random], bytes]] = [
        _wrong_number,
        _wrong_structure,
        _unknown_field,
        _broken_json,
        _wrong_head,
        _garbage,
        _flipped,
        _wrong_prompt,
    ]
    return rng.choice(makers)(rng)


def _post(path: str, body: bytes, head: bytes = b"content-type: application/json\r\n") -> bytes:
    length = b"content-length: %d\r\n" % len(body)
    return (
        b"POST "
        + path.encode()
        + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        + head
        + length
        + b"\r\n"
        + body
    )


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _wrong_number(rng: random.Random) -> bytes:
    path = rng.choice(PATHS[:2])
    return _post(path, _json({**GOOD[path], rng.choice(NUMBER_FIELDS): rng.choice(WRONG_NUMBERS)}))


def _wrong_structure(rng: random.Random) -> bytes:
    path = rng.choice(PATHS[:2])
    return _post(path, _json({**GOOD[path], rng.choice(STRUCTURES): rng.choice(WRONG_STRUCTURES)}))


def _unknown_field(rng: random.Random) -> bytes:
    path = rng.choice(PATHS)
    name = "".join(rng.choices("abcxyz_", k=rng.randint(5, 40))) + "!"
    return _post(path, _json({**GOOD[path], name: rng.choice(WRONG_STRUCTURES)}))


def _wrong_prompt(rng: random.Random) -> bytes:
    prompt = rng.choice(
        [[], [[]], {}, 5, None, [-1], [2048], [1e9], [[1], 2], "\udc00", [{}], [["x"]], ["x"] * 2000]
    )
    return _post("/v1/completions", _json({"prompt": prompt}))


def _broken_json(rng: random.Random) -> bytes:
    path = rng.choice(PATHS)
    body = bytearray(_json(GOOD[path]))
    kind = rng.randrange(4)
    if kind == 0:
        del body[rng.randrange(1, len(body)) :]
    elif kind == 1:
        body += bytes(rng.choices(range(33, 127), k=3))
    elif kind == 2:
        body = bytearray(b'{"messages": ' + b"[" * rng.choice([10, 100, 50_000]))
    else:
        body = bytearray(
            rng.choice([b"", b"NaN", b"[]", b"nul", b'"', b"\xff\xfe", b"\x00", b'{"prompt": "\xc3\x28"}'])
        )
    return _post(path, bytes(body))


def _wrong_head(rng: random.Random) -> bytes:
    heads = [
        b"content-type: text/plain\r\n",
        b"content-type: application/json\r\ncontent-encoding: gzip\r\n",
        b"content-type: application/json\r\nx: " + b"a" * 20_000 + b"\r\n",
        b"content-type: application/json\r\n" + b"y: 1\r\n" * 200,
        b"content-type: application/json\r\nhost: elsewhere.example\r\n",
        b"content-type: application/json\r\ntransfer-encoding: chunked\r\n",
        b"no colon here\r\n",
        b"\x00: \x00\r\n",
    ]
    path = rng.choice([*PATHS, "/nowhere", "/v1/../etc/passwd", "/%00", "//", "/v1/models/none"])
    return _post(path, _json({"prompt": 5}), rng.choice(heads))


def _garbage(rng: random.Random) -> bytes:
    return bytes(rng.randrange(256) for _ in range(rng.randint(1, 400))) + b"\r\n\r\n"


def _flipped(rng: random.Random) -> bytes:
    """A request that was right before one byte of its head was changed to one that no head may hold."""
    sent = bytearray(_post("/v1/completions", _json({"prompt": -1})))
    sent[rng.randrange(sent.index(b"\r\n\r\n"))] = rng.choice(b"\x00\x01\x7f\xff\r")
    return bytes(sent)
