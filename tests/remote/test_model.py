"""The shipped model in a process of its own says what it says in this one, and refuses what it refuses here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from headway.aio import AsyncLLM
from headway.errors import HeadwayError
from headway.outputs import PromptLogprobs, TokenLogprobs
from headway.remote.client import RemoteEngine
from headway.request import RequestOutputKind, SamplingParams
from headway.server.client import EngineClient, EngineOutput, EngineRequest

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "max_num_seqs": 4,
    "max_model_len": 128,
    "max_waiting": 8,
    "seed": 3,
}
PROMPT = "def read_lines(path):"
Ask = Callable[[EngineClient], Awaitable[Any]]


@pytest.fixture(scope="module")
def both(tiny_model_dir: Path) -> Iterator[Callable[[Ask], tuple[Any, Any]]]:
    """Asks the engine of another process and that of this one the same."""
    runner = asyncio.Runner()
    there = RemoteEngine(tiny_model_dir, **SETTINGS)
    here = AsyncLLM(tiny_model_dir, **SETTINGS)
    yield lambda ask: (runner.run(ask(there)), runner.run(ask(here)))
    runner.run(there.close())
    runner.run(here.close())
    runner.close()


async def whole(client: EngineClient, request: EngineRequest) -> Any:
    """Completions by index, without times; or the error that it ended with."""
    found: dict[int, list[EngineOutput]] = {}
    try:
        async for output in client.stream(request):
            found.setdefault(output.index, []).append(output)
    except HeadwayError as error:
        return type(error), str(error), error.hint
    return {index: _summary(outputs) for index, outputs in sorted(found.items())}


def _summary(outputs: list[EngineOutput]) -> dict[str, Any]:
    last = outputs[-1]
    assert last.metrics is not None
    assert last.metrics.finished_s is not None
    logprobs: list[TokenLogprobs] = [entry for output in outputs for entry in output.logprobs or ()]
    prompt: list[PromptLogprobs] = [o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None]
    return {
        "text": "".join(output.text for output in outputs),
        "token_ids": [token for output in outputs for token in output.token_ids],
        "end": (last.finish_reason, last.stop_reason),
        "num_prompt_tokens": last.usage.num_prompt_tokens,
        "logprobs": logprobs,
        "prompt_logprobs": prompt,
    }


CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "several": {"n": 3, "seed": 5},
    "logprobs": {"logprobs": 5, "prompt_logprobs": 2, "seed": 1},
    "last alone": {"seed": 2, "output_kind": RequestOutputKind.FINAL_ONLY},
    "stop": {"temperature": 0, "stop": ["return", "\n\n"], "include_stop_str_in_output": True},
    "many fields": {
        "seed": 2**64 - 1, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "logit_bias": {40: 3.5}, "bad_words": ["self"],
        "repetition_penalty": 1.3, "presence_penalty": 0.5, "min_tokens": 4, "stop_token_ids": [7],
    },
    "regex": {"structured_outputs": {"regex": "[a-f]{4}-[0-9]{2}"}, "temperature": 0},
    "schema": {"structured_outputs": {"json": {"enum": ["yes", "no"]}}, "seed": 4},
    "no grammar": {"structured_outputs": {"regex": "("}},
    "to the end": {"max_tokens": 4000},
    "too many logprobs": {"logprobs": 100},
    "outside": {"allowed_token_ids": [5000]},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_says_what_it_says_here(both: Callable[[Ask], tuple[Any, Any]], case: str) -> None:
    if "structured_outputs" in CASES[case]:
        pytest.importorskip("llguidance")

    async def ask(client: EngineClient) -> Any:
        assert client.tokenizer is not None
        token_ids = client.tokenizer.encode(PROMPT)
        params = SamplingParams(**{"max_tokens": 24, **CASES[case]})
        return await whole(client, EngineRequest(f"r-{case}", token_ids, params))

    there, here = both(ask)
    assert there == here
    assert isinstance(there, tuple) == (case in ("no grammar", "too many logprobs", "outside"))


def test_it_is_what_it_is_here(both: Callable[[Ask], tuple[Any, Any]]) -> None:
    async def ask(client: EngineClient) -> Any:
        assert client.tokenizer is not None
        text = client.tokenizer.decode(client.tokenizer.encode("héllo <|im_end|>"), skip_special_tokens=False)
        template = client.chat_template
        assert template is not None
        rendered = template.render([{"role": "user", "content": "hello"}])
        await whole(client, EngineRequest("s", [5, 6, 7], SamplingParams(max_tokens=4, seed=1)))
        stats = replace(await client.stats(), seconds_since_progress=0.0)
        assert [span.step for span in await client.recent_steps()]
        return text, rendered, client.tokenizer.special_tokens, template.variables, client.info, asdict(stats)

    there, here = both(ask)
    assert there[:5] == here[:5]
    assert set(there[5]) == set(here[5])
    assert there[5]["num_output_tokens_total"] == here[5]["num_output_tokens_total"] > 0
    assert there[5]["prefix_cache"] == here[5]["prefix_cache"]


def test_profiles_and_the_cache_are_reached(both: Callable[[Ask], tuple[Any, Any]]) -> None:
    async def ask(client: EngineClient) -> Any:
        await client.start_profile()
        await whole(client, EngineRequest("p", [5, 6, 7], SamplingParams(max_tokens=4)))
        num_events = len(json.loads(await client.stop_profile())["traceEvents"])
        return num_events > 4, await client.reset_prefix_cache(), (await client.health()).is_ready

    assert both(ask) == ((True, True, True),) * 2
