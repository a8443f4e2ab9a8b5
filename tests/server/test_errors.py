"""Wrong requests: the status, the envelope and the field each is answered with. None of them reaches the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headway.errors import EngineDeadError
from headway.server.errors import from_exception, shown
from tests.server.fake_engine import MAX_MODEL_LEN, VOCAB_SIZE, FakeEngine
from tests.server.live import Live

FINE = {"prompt": "x", "max_tokens": 2}
LONG = 2**31
WRONG_FIELDS: list[tuple[dict[str, Any], str | None]] = [
    *(({"temperature": value}, "temperature") for value in (-1, 3, "hot", True, [])),
    *(({"top_p": value}, "top_p") for value in (0, -0.1, 1.1)),
    *(({"top_k": value}, "top_k") for value in (-2, 1.5, LONG)),
    *(({"min_p": value}, "min_p") for value in (-0.1, 2)),
    *(({"n": value}, "n") for value in (0, -1, 10**6, "1")),
    *(({"max_tokens": value}, "max_tokens") for value in (-1, 0, LONG, 1.5, "2", MAX_MODEL_LEN)),
    *(({"min_tokens": value}, "min_tokens") for value in (-1, 3)),
    *(({"logprobs": value}, "logprobs") for value in (-2, 10**4, True)),
    *(({"seed": value}, "seed") for value in (2**64, -(2**64), 0.5)),
    *(({"presence_penalty": value}, "presence_penalty") for value in (-2.1, 2.1)),
    *(({"repetition_penalty": value}, "repetition_penalty") for value in (0, -1, 1000)),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop": ["a" * 2000]}, "stop[0]"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"suffix": "after"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"chunks": 1}}, "stream_options.chunks"),
    ({"guided_json": {}}, "guided_json"),
    ({"logits_processors": []}, "logits_processors"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"length_penalty": 0.5, "guided_json": None}, "length_penalty"),
    ({"guided_json": None, "temperature": "hot"}, "temperature"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"temprature": 1}, "temprature"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "x"]}, "prompt"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [VOCAB_SIZE]}, "prompt"),
    ({"prompt": [2**31]}, "prompt[0]"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": {"prompt": "x"}}, "prompt"),
    ({"prompt": ["x"] * 1025}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"structured_outputs": {"json": 3}}, "structured_outputs.json"),
    ({"model": 3}, "model"),
    *(({"request_id": value}, "request_id") for value in ("x" * 1000, "a line\nof the log", "a\n")),
    ({"prompt": [VOCAB_SIZE] * MAX_MODEL_LEN, "echo": True}, "prompt"),
]
HARMLESS = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "safety_identifier": "x",
    "prompt_cache_key": "y",
    "n": None,
    "suffix": "",
    "best_of": 1,
    "seed": -1,
    "model": "",
    "guided_json": None,
    "a_field_of_tomorrow": None,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "modalities": ["text"],
}
WRONG_BODIES = [
    b"",
    b"x",
    b"[]",
    b"null",
    b"3",
    b'"prompt"',
    b"{",
    b'{"prompt": NaN}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "guided_json": null, ',
    b'{"guided_json": null}',
    b'{"prompt": "x", "temperature": Infinity}',
    b'{"prompt": "x", "temperature": 1e400}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\x00"}',
    b'\xef\xbb\xbf{"prompt": "x"}',
    b'{"prompt": "x"} trailing',
    b'{"prompt": "x", "metadata": ' + b"[" * 100 + b"]" * 100 + b"}",
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": "x", "metadata": ' + b'{"a":' * 100_000,
    b"\x00" * 100,
]


@pytest.mark.parametrize(("fields", "param"), WRONG_FIELDS, ids=lambda value: repr(value)[:60])
def test_a_wrong_field_is_named(fake_server: Live, fields: dict[str, Any], param: str) -> None:
    engine = fake_server.client
    assert isinstance(engine, FakeEngine)
    num_seen = len(engine.seen)
    answer = fake_server.post("/v1/completions", {**FINE, **fields})
    assert answer.status == 400, answer.body
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"] == param
    assert len(engine.seen) == num_seen


@pytest.mark.parametrize("body", WRONG_BODIES, ids=lambda body: repr(body)[:40])
def test_a_wrong_body_is_refused(fake_server: Live, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = fake_server.post(path, body)
        assert answer.status == 400, (path, answer.body)
        assert len(answer.body) < 1000
        assert answer.error["message"]


def test_what_changes_no_answer_is_taken(fake_server: Live) -> None:
    assert fake_server.post("/v1/completions", {**FINE, **HARMLESS}).status == 200


def test_an_unknown_name_hints_at_the_one_that_was_meant(fake_server: Live) -> None:
    assert "temperature" in fake_server.post("/v1/completions", {**FINE, "temprature": 1}).error["message"]


def test_an_unknown_model_is_not_found(fake_server: Live) -> None:
    for path, body in (
        ("/v1/completions", {**FINE, "model": "gpt"}),
        ("/v1/chat/completions", {"model": "gpt", "messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"prompt": "x", "model": "gpt"}),
    ):
        answer = fake_server.post(path, body)
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
    assert fake_server.get("/v1/models/gpt").status == 404
    assert fake_server.get("/v1/models/fake").json["id"] == "fake"


def test_routes_and_methods(fake_server: Live) -> None:
    assert fake_server.get("/nowhere").error["code"] == "not_found"
    answer = fake_server.get("/v1/completions")
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert fake_server.request("DELETE", "/v1/models", None, {}).status == 405
    assert fake_server.get("/v1/models/").status == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": ""},
        {"content-encoding": "gzip"},
        {"content-type": "multipart/form-data"},
    ],
)
def test_only_plain_json_is_read(fake_server: Live, headers: dict[str, str]) -> None:
    answer = fake_server.request("POST", "/v1/completions", FINE, headers)
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")


def test_a_long_value_is_not_sent_back_whole(fake_server: Live) -> None:
    answer = fake_server.post("/v1/completions", {**FINE, "model": "m" * 500})
    assert len(answer.body) < 600
    assert len(shown("x" * 10**6)) < 300
    assert shown(list(range(100))) == "100 items"
    assert len(shown({"a": "y" * 10**5})) < 300


def test_what_is_unexpected_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    error = from_exception(KeyError("/secret/path"))
    body = json.loads(error.body())["error"]
    assert error.status == 500
    assert "secret" not in json.dumps(body)
    error_id = body["message"].split()[-1]
    assert error_id in caplog.text
    assert "secret" in caplog.text
    assert from_exception(EngineDeadError("/secret")).status == 503
    assert b"secret" not in from_exception(EngineDeadError("/secret")).body()


def test_tokens_are_checked_and_counted(fake_server: Live) -> None:
    reply = fake_server.post("/tokenize", {"prompt": "def f():", "return_token_strs": True}).json
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert reply["max_model_len"] == MAX_MODEL_LEN
    bare = fake_server.post("/tokenize", {"prompt": "def f():", "add_special_tokens": False}).json["tokens"]
    assert fake_server.post("/detokenize", {"tokens": bare}).json == {"prompt": "def f():"}
    assert fake_server.post("/detokenize", {"tokens": []}).json == {"prompt": ""}
    for token in (-1, VOCAB_SIZE, 2**40, 2**70):
        assert fake_server.post("/detokenize", {"tokens": [token]}).error["param"] == "tokens"
    info = fake_server.get("/tokenizer_info").json
    assert info["eos_token"] == "<|eos|>"
    assert "im_start" in info["chat_template"]
