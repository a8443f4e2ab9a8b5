"""/v1/completions over the shipped model: prompts, echo, logprobs, n, and streams that say what wholes do."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.live import Live

PROMPT = "def fib(n):"
GREEDY = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}


def ask(server: Live, **fields: Any) -> Any:
    answer = server.post("/v1/completions", {**GREEDY, **fields})
    assert answer.status == 200, answer.body
    return answer.json


def texts(reply: Any) -> list[str]:
    return [choice["text"] for choice in reply["choices"]]


def streamed(server: Live, **fields: Any) -> list[Any]:
    answer = server.post("/v1/completions", {**GREEDY, **fields, "stream": True})
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    return answer.events


def test_the_forms_of_a_prompt_are_one(model_server: Live) -> None:
    ids = model_server.post("/tokenize", {"prompt": PROMPT}).json["tokens"]
    plain = texts(ask(model_server))
    assert plain[0]
    assert texts(ask(model_server, prompt=ids)) == plain
    assert texts(ask(model_server, prompt=[PROMPT])) == plain
    assert texts(ask(model_server, prompt=[ids, PROMPT])) == plain * 2
    assert texts(ask(model_server, prompt=[ids[:3], ids])) != plain * 2


def test_a_reply_says_what_it_is(model_server: Live) -> None:
    reply = ask(model_server, n=1)
    assert reply["object"] == "text_completion"
    assert reply["id"].startswith("cmpl-")
    assert reply["model"] == "tiny"
    usage = reply["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert reply["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "temperature": 1.0, "seed": 7, "prompt": [PROMPT, "import os"]},
        {"echo": True},
        {"stop": ["\n", "x"], "max_tokens": 40},
        {"stop": "(", "include_stop_str_in_output": True, "max_tokens": 40},
        {"temperature": 1.0, "seed": -5, "top_k": 20, "min_p": 0.01, "max_tokens": 40},
        {"logprobs": 2},
    ],
    ids=str,
)
def test_a_stream_says_what_the_whole_says(model_server: Live, fields: dict[str, Any]) -> None:
    whole = ask(model_server, **fields)
    events = streamed(model_server, **fields, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    for index, choice in enumerate(whole["choices"]):
        parts = [c for event in events for c in event["choices"] if c["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        reasons = [part["finish_reason"] for part in parts]
        assert reasons == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]
        if choice["logprobs"] is not None:
            for name in ("tokens", "token_logprobs", "text_offset"):
                told = [value for part in parts for value in part["logprobs"][name]]
                assert told == choice["logprobs"][name]


def test_usage_comes_when_asked(model_server: Live) -> None:
    assert all("usage" not in event for event in streamed(model_server))
    options = {"include_usage": True, "continuous_usage_stats": True}
    totals = [event["usage"]["total_tokens"] for event in streamed(model_server, stream_options=options)]
    assert totals == sorted(totals)
    assert len(set(totals)) > 3


def test_a_stop_string_is_named_and_cut(model_server: Live) -> None:
    free = texts(ask(model_server, max_tokens=40))[0]
    stop = free[5:8]
    (choice,) = ask(model_server, max_tokens=40, stop=["never there", stop])["choices"]
    assert choice["text"] == free[: free.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_logprobs_cover_every_token(model_server: Live) -> None:
    (choice,) = ask(model_server, logprobs=3)["choices"]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == 12
    assert "".join(found["tokens"]) == choice["text"]
    for token, logprob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values())
        assert 2 <= len(top) <= 3
    (alone,) = ask(model_server, logprobs=0)["choices"]
    assert [list(top) for top in alone["logprobs"]["top_logprobs"]] == [[token] for token in found["tokens"]]


def test_echo_gives_the_prompt_back(model_server: Live) -> None:
    whole = texts(ask(model_server))[0]
    assert texts(ask(model_server, echo=True)) == [PROMPT + whole]
    reply = ask(model_server, echo=True, max_tokens=0)
    assert texts(reply) == [PROMPT]
    assert reply["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("prompt", ["é数😀 = x", "<|im_end|> y", [1, 6, 2, 7], "(ids)"], ids=str)
@pytest.mark.parametrize("as_ids", [False, True])
def test_offsets_are_places_in_the_text(model_server: Live, prompt: Any, as_ids: bool) -> None:
    """Where characters are cut into tokens, and where special tokens are not part of the text, too."""
    if prompt == "(ids)":
        prompt = model_server.post("/tokenize", {"prompt": "ß😀 "}).json["tokens"]
    extra = {"return_tokens_as_token_ids": True} if as_ids else {}
    fields = {"echo": True, "logprobs": 0, "max_tokens": 6, "ignore_eos": True, "prompt": prompt, **extra}
    (choice,) = ask(model_server, **fields)["choices"]
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    names = ask(model_server, **{**fields, "return_tokens_as_token_ids": False})["choices"][0]["logprobs"][
        "tokens"
    ]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(text)
    for name, begin, end in zip(names, offsets, [*offsets[1:], len(text)], strict=True):
        assert text[begin:end] in (name, "") or "\ufffd" in name, (name, text[begin:end])
    tail = "".join(names[-6:])
    assert "\ufffd" in tail or (text.endswith(tail) and offsets[-6] == len(text) - len(tail))


def test_ids_are_returned_when_asked(model_server: Live) -> None:
    (choice,) = ask(model_server, return_token_ids=True, logprobs=0, return_tokens_as_token_ids=True)[
        "choices"
    ]
    assert choice["prompt_token_ids"] == model_server.post("/tokenize", {"prompt": PROMPT}).json["tokens"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]


def test_the_context_is_the_limit(model_server: Live) -> None:
    answer = model_server.post("/v1/completions", {**GREEDY, "max_tokens": 1000})
    assert answer.status == 400
    assert answer.error["code"] == "context_length_exceeded"
    answer = model_server.post("/v1/completions", {**GREEDY, "prompt": [5] * 600})
    assert (answer.status, answer.error["param"]) == (400, "prompt")


def test_an_echoed_prompt_is_scored_as_it_would_be_generated(model_server: Live) -> None:
    """To the bit on a CPU: one recurrent kernel computes prompts and decode, and one sampler both logprobs."""
    ids = model_server.post("/tokenize", {"prompt": "def read_lines(path):\n    with open"}).json["tokens"]
    fields = {"prompt": [ids, ids[:4]], "echo": True, "logprobs": 5, "max_tokens": 1}
    whole, short = (choice["logprobs"] for choice in ask(model_server, **fields)["choices"])
    assert len(whole["tokens"]) == len(ids) + 1
    assert whole["token_logprobs"][0] is None
    assert whole["top_logprobs"][0] is None
    assert whole["text_offset"][0] == 0
    assert short["token_logprobs"][:4] == whole["token_logprobs"][:4]
    for end in range(1, len(ids)):
        (choice,) = ask(model_server, prompt=ids[:end], logprobs=5, max_tokens=1)["choices"]
        (top,) = choice["logprobs"]["top_logprobs"]
        name = whole["tokens"][end]
        assert max(whole["top_logprobs"][end].values()) == max(top.values())
        if name in top:
            assert whole["token_logprobs"][end] == pytest.approx(top[name], abs=1e-6)
    events = streamed(model_server, **fields)
    told = [
        v for e in events for c in e["choices"] if c["index"] == 0 for v in c["logprobs"]["token_logprobs"]
    ]
    assert told == whole["token_logprobs"]


def test_a_prompt_is_cut_where_that_is_asked(model_server: Live) -> None:
    ids = model_server.post("/tokenize", {"prompt": PROMPT * 200}).json["tokens"]
    assert len(ids) > 512
    reply = ask(model_server, prompt=ids, truncate_prompt_tokens=-1)
    assert reply["usage"]["prompt_tokens"] == 512 - 12
    reply = ask(model_server, prompt=ids, truncate_prompt_tokens=5, echo=True, logprobs=0)
    assert reply["usage"]["prompt_tokens"] == 5
    assert len(reply["choices"][0]["logprobs"]["tokens"]) == 5 + 12
    assert reply["choices"][0]["text"].endswith(texts(ask(model_server, prompt=ids[-5:]))[0])
    messages = [{"role": "user", "content": PROMPT * 200}]
    body = {"messages": messages, "truncate_prompt_tokens": 30, "max_tokens": 2}
    assert model_server.post("/v1/chat/completions", body).json["usage"]["prompt_tokens"] == 30
    assert model_server.post("/v1/completions", {**GREEDY, "truncate_prompt_tokens": 0}).status == 400


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"prompt": ["a", "b"]}])
def test_a_grammar_that_cannot_go_on_is_the_callers_error(model_server: Live, fields: dict[str, Any]) -> None:
    """Clients send a 5xx again. Whatever the text may begin with is banned."""
    pytest.importorskip("llguidance")
    form = {"structured_outputs": {"regex": "ab"}, "bad_words": ["a", "ab"]}
    answer = model_server.post("/v1/completions", {**GREEDY, **form, **fields})
    error = answer.json["error"] if answer.status == 400 else answer.events[-2]["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "grammar_failed"), error
    assert ask(model_server)["choices"][0]["finish_reason"] in ("stop", "length")
