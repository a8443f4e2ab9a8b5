"""The official client against a live server with the shipped model: it is understood, and finds what it reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from headway.aio import AsyncLLM
from tests.server.fake_engine import FakeEngine
from tests.server.live import Live, live, wait_until

USER: Any = [{"role": "user", "content": "a function that adds"}]
# Its HTTP library opens its own log handlers and sockets at exit.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def client(model_server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{model_server.url}/v1", api_key="unused", max_retries=0) as found:
        yield found


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "also-tiny"]
    assert client.models.retrieve("also-tiny").owned_by == "headway"


def test_a_completion_and_its_stream(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "prompt": "def add(", "max_tokens": 12, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**fields)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    events = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].text for event in events[:-1]) == whole.choices[0].text
    assert events[-1].usage == whole.usage
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.tokens or []) == 12


def test_a_chat_and_its_stream(client: openai.OpenAI) -> None:
    fields: Any = {
        "model": "tiny",
        "messages": USER,
        "max_completion_tokens": 12,
        "temperature": 0,
        "logprobs": True,
    }
    whole = client.chat.completions.create(**fields, top_logprobs=2).choices[0]
    assert whole.message.role == "assistant"
    assert whole.finish_reason in ("stop", "length")
    assert whole.logprobs is not None
    assert len((whole.logprobs.content or [])[0].top_logprobs) == 2
    events = client.chat.completions.create(**fields, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in events) == whole.message.content


def test_n_and_seed(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "prompt": ["a", "b"], "n": 2, "seed": 5, "max_tokens": 8}
    first, second = (client.completions.create(**fields).choices for _ in range(2))
    assert [choice.index for choice in first] == [0, 1, 2, 3]
    assert [choice.text for choice in first] == [choice.text for choice in second]
    assert len({choice.text for choice in first}) > 1


def test_extra_fields_of_other_servers(client: openai.OpenAI) -> None:
    extra = {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.1, "stop_token_ids": [7], "ignore_eos": True}
    reply = client.completions.create(model="tiny", prompt="x", max_tokens=5, user="me", extra_body=extra)
    assert reply.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"extra_body": {"guided_json": {}}}, openai.BadRequestError, "guided_json"),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_an_error_has_its_class(
    client: openai.OpenAI,
    fields: dict[str, Any],
    kind: type[openai.APIStatusError],
    param: str,
    is_stream: bool,
) -> None:
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "x", "stream": is_stream, **fields})
    assert caught.value.param == param


def test_a_wrong_key_and_an_overload_have_theirs() -> None:
    with live(FakeEngine(max_live=0), api_key=["right"]) as server:
        asks: Any = {"model": "fake", "prompt": "x"}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            with pytest.raises(openai.InternalServerError) as caught:
                client.with_options(api_key="right").completions.create(**asks)
        assert caught.value.code == "overloaded"


def test_a_stream_that_fails_raises() -> None:
    engine = FakeEngine(step_s=0.01)
    engine.num_steps_before_fault = 2
    with (
        live(engine) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        events = client.completions.create(model="fake", prompt="x", stream=True)
        assert next(events).choices[0].text == "a"
        with pytest.raises(openai.APIError, match="the engine has stopped"):
            list(events)


def test_a_stream_that_is_closed_frees_what_it_held(client: openai.OpenAI, model_server: Live) -> None:
    assert isinstance(model_server.client, AsyncLLM)
    stream = client.completions.create(
        model="tiny", prompt="x", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    assert model_server.get("/load").json["num_running"] == 1
    stream.close()

    def is_free() -> bool:
        found = model_server.get("/load").json
        return bool(
            found["num_running"] == 0
            and found["kv_blocks_free"] == found["kv_blocks_total"]
            and found["state_slots_free"] == found["state_slots_total"]
        )

    wait_until(is_free)
