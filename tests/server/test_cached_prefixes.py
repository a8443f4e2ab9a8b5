"""Cached prefixes over HTTP: usage says what was found, and nobody finds what another key's callers have left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headway.aio import AsyncLLM
from tests.server.live import Live, live

KEYS = ("key of Ada", "key of Bob")
LINES = "".join(f"def add_{i}(a, b):\n    return a + b + {i}\n\n" for i in range(6))


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[Live]:
    llm = AsyncLLM(tiny_model_dir, device="cpu", max_num_seqs=4, max_model_len=512)
    with live(llm, api_key=list(KEYS), enable_dev_endpoints=True) as found:
        yield found


def usage(server: Live, key: str, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, **fields}
    answer = server.post("/v1/completions", body, authorization=f"Bearer {key}")
    assert answer.status == 200, answer.body
    found = answer.events[-1]["usage"] if fields.get("stream") else answer.json["usage"]
    return dict(found)


def num_cached(server: Live, key: str, prompt: str, **fields: Any) -> int:
    return int(usage(server, key, prompt, **fields)["prompt_tokens_details"]["cached_tokens"])


def test_the_second_time_most_of_a_prompt_is_cached(server: Live) -> None:
    prompt = "# again\n" + LINES
    assert num_cached(server, KEYS[0], prompt) == 0
    found = usage(server, KEYS[0], prompt)
    assert (
        found["prompt_tokens"] // 2 < found["prompt_tokens_details"]["cached_tokens"] < found["prompt_tokens"]
    )
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert usage(server, KEYS[0], prompt, **streamed) == found


def test_another_keys_caller_finds_nothing(server: Live) -> None:
    prompt = "# of one key\n" + LINES
    assert num_cached(server, KEYS[0], prompt) == 0
    assert num_cached(server, KEYS[1], prompt) == 0
    assert num_cached(server, KEYS[1], prompt) > 0


def test_a_salt_divides_the_callers_of_one_key(server: Live) -> None:
    prompt = "# of one salt\n" + LINES
    assert num_cached(server, KEYS[0], prompt, cache_salt="red") == 0
    assert num_cached(server, KEYS[0], prompt, cache_salt="blue") == 0
    assert num_cached(server, KEYS[0], prompt) == 0
    assert num_cached(server, KEYS[0], prompt, cache_salt="red") > 0
    assert num_cached(server, KEYS[1], prompt, cache_salt="red") == 0


@pytest.mark.parametrize("is_stream", [False, True])
def test_who_opts_out_finds_nothing_and_leaves_nothing(server: Live, is_stream: bool) -> None:
    prompt = f"# not kept, {is_stream}\n" + LINES
    streamed = {"stream": True, "stream_options": {"include_usage": True}} if is_stream else {}
    assert num_cached(server, KEYS[0], prompt, use_prefix_cache=False, **streamed) == 0
    assert num_cached(server, KEYS[0], prompt, use_prefix_cache=None, **streamed) == 0
    assert num_cached(server, KEYS[0], prompt, use_prefix_cache=False, **streamed) == 0
    assert num_cached(server, KEYS[0], prompt, use_prefix_cache=True, **streamed) > 0


def test_a_reset_forgets(server: Live) -> None:
    prompt = "# forgotten\n" + LINES
    num_cached(server, KEYS[0], prompt)
    assert num_cached(server, KEYS[0], prompt) > 0
    answer = server.post("/reset_prefix_cache", {}, authorization=f"Bearer {KEYS[0]}")
    assert answer.json == {"is_reset": True}
    assert num_cached(server, KEYS[0], prompt) == 0
