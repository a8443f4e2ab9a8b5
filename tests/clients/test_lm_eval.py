"""lm-eval against a live server: its log-likelihoods are the engine's own, its generations are the engine's text.

Heavy: `pip install 'headway[serve,eval]'`, then `pytest -m clients`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed", allow_module_level=True)

from headway.aio import AsyncLLM
from tests.server.live import Live, live

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
PAIRS = [
    ("def read_lines(path):", "\n    with open(path)"),
    ("import", " os\nimport sys"),
    ("for i in", " range(10):"),
]


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[Live]:
    llm = AsyncLLM(
        tiny_model_dir,
        device="cpu",
        max_num_seqs=8,
        max_model_len=512,
        generation_config="none",
        max_logprobs=1024,
    )
    with live(llm, served_model_name=["tiny"]) as found:
        yield found


@pytest.fixture(scope="module")
def harness(server: Live) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        model="tiny",
        base_url=f"{server.url}/v1/completions",
        tokenizer_backend="remote",
        max_length=512,
        batch_size=2,
        num_concurrent=1,
        max_retries=1,
    )


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=i)  # type: ignore[arg-type]
        for i, pair in enumerate(arguments)
    ]


def test_generations_are_the_engines(harness: Any, server: Live) -> None:
    asks = [(prompt, {"until": ["\n\n"], "max_gen_toks": 16, "temperature": 0}) for prompt, _ in PAIRS]
    found = harness.generate_until(instances("generate_until", asks))
    for (prompt, _), text in zip(asks, found, strict=True):
        body = {
            "prompt": prompt,
            "stop": ["\n\n"],
            "max_tokens": 16,
            "temperature": 0,
            "add_special_tokens": False,
        }
        assert text == server.post("/v1/completions", body).json["choices"][0]["text"]
    assert any(found)


def test_log_likelihoods_are_the_engines(harness: Any, server: Live) -> None:
    """Of each pair, the sum over the continuation's tokens, asked for here one step at a time."""
    found = harness.loglikelihood(instances("loglikelihood", PAIRS))
    for (context, continuation), (value, is_greedy) in zip(PAIRS, found, strict=True):
        ids = server.post("/tokenize", {"prompt": context + continuation, "add_special_tokens": False}).json[
            "tokens"
        ]
        start = server.post("/tokenize", {"prompt": context, "add_special_tokens": False}).json["count"]
        total, is_best = 0.0, True
        for end in range(start, len(ids)):
            body = {"prompt": ids[:end], "max_tokens": 1, "temperature": 0, "logprobs": 1024}
            reply = server.post("/v1/completions", {**body, "return_tokens_as_token_ids": True}).json
            (all_logprobs,) = reply["choices"][0]["logprobs"]["top_logprobs"]
            total += all_logprobs[f"token_id:{ids[end]}"]
            is_best &= all_logprobs[f"token_id:{ids[end]}"] == max(all_logprobs.values())
        assert value == pytest.approx(total, abs=1e-3)
        assert is_greedy == is_best
