"""One streamed request to an OpenAI-compatible server, and when its pieces came."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from headway.cli.bench.datasets import BenchPrompt

if TYPE_CHECKING:
    import httpx

EVENT_START, EVENT_END = b"data:", b"\n\n"


@dataclass(slots=True)
class Answer:
    """Seconds of `time.perf_counter`, or lengths of time in seconds.

    Attributes:
        ttft_s: until the first event that brought output; None where none came.
        gaps_s: between one such event and the next.
        error: empty where all went well.
    """

    begin_s: float
    num_input_tokens: int
    num_output_tokens: int = 0
    end_s: float = 0.0
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    text: str = ""
    error: str = ""

    @property
    def is_ok(self) -> bool:
        return not self.error

    @property
    def latency_s(self) -> float:
        return self.end_s - self.begin_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first."""
        if self.ttft_s is None or self.num_output_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and what they all have in common. With `is_chat` a prompt is a message of words."""

    path: str
    common: dict[str, Any]
    is_chat: bool

    def body(self, prompt: BenchPrompt) -> dict[str, Any]:
        limit = {"max_completion_tokens" if self.is_chat else "max_tokens": prompt.output_len}
        if not self.is_chat:
            return {**self.common, **limit, "prompt": prompt.token_ids}
        words = " ".join(_WORDS[token % len(_WORDS)] for token in prompt.token_ids)
        return {**self.common, **limit, "messages": [{"role": "user", "content": words}]}


# Most tokenizers have one token for each, with the space before it.
_WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "he",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "at",
)


async def ask(http: httpx.AsyncClient, target: Target, prompt: BenchPrompt, request_id: str) -> Answer:
    """Never raises for what the server or the network does: the answer says it."""
    import httpx

    answer = Answer(time.perf_counter(), len(prompt.token_ids))
    last_s = answer.begin_s
    request = http.build_request(
        "POST", target.path, json=target.body(prompt), headers={"x-request-id": request_id}
    )
    try:
        reply = await http.send(request, stream=True)
        try:
            if reply.status_code != 200:
                body = (await reply.aread()).decode(errors="replace")
                answer.error = f"{reply.status_code} {body[:300]}"
            else:
                async for event in _events(reply.aiter_raw()):
                    last_s = _note(answer, event, last_s)
        finally:
            await reply.aclose()
    except (httpx.HTTPError, ValueError, KeyError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.end_s = last_s if answer.is_ok else time.perf_counter()
    if answer.is_ok and answer.ttft_s is None:
        answer.error = "the stream brought no output"
    return answer


def _note(answer: Answer, event: dict[str, Any], last_s: float) -> float:
    """When the last event that brought something came."""
    if "error" in event:
        answer.error = str(event["error"].get("message", event["error"]))
    if usage := event.get("usage"):
        answer.num_input_tokens = usage.get("prompt_tokens", answer.num_input_tokens)
        answer.num_output_tokens = usage.get("completion_tokens", 0)
    if not (choices := event.get("choices")) or not (text := _text_of(choices[0])).is_news:
        return last_s
    now_s = time.perf_counter()
    if answer.ttft_s is None:
        answer.ttft_s = now_s - answer.begin_s
    else:
        answer.gaps_s.append(now_s - last_s)
    answer.text += text.content
    return now_s


class _Text(NamedTuple):
    content: str
    is_news: bool


def _text_of(choice: dict[str, Any]) -> _Text:
    """A chat's role and end come in events of their own, which are no tokens; a completion's events all are."""
    if "delta" not in choice:
        return _Text(choice.get("text") or "", True)
    delta = choice["delta"]
    has_more = any(delta.get(name) for name in ("reasoning", "reasoning_content", "tool_calls"))
    content = delta.get("content") or ""
    return _Text(content, bool(content) or has_more)


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """JSON of each event up to [DONE]."""
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(EVENT_END)
        for event in whole:
            data = event.strip().removeprefix(EVENT_START).strip()
            if data == b"[DONE]":
                return
            if data and not data.startswith(b":"):
                yield json.loads(data)
