"""Events whose constant parts are encoded once are the events that a whole record makes."""

from __future__ import annotations

import pytest

from headway.server.schemas.chat import ChatChunk, ChatChunkChoice, MessageDelta
from headway.server.schemas.completions import CompletionChoice, CompletionResponse
from headway.server.sse import TextEvent, event

TEXTS = (
    "",
    "a",
    ' "quoted"\\\n',
    "\0",
    "\0\0 \\u0000",
    "\u2028\u00e9\U0001f600",
    "data: [DONE]\n\n",
    "x" * 70_000,
)
NAMES = ("small", "\0", '"\\u0000"', '"\0",')


def completion(name: str, text: str) -> CompletionResponse:
    return CompletionResponse(f"cmpl-{name}", 1, name, [CompletionChoice(2, text, None, None, None)])


def chunk(name: str, text: str) -> ChatChunk:
    return ChatChunk(f"chatcmpl-{name}", 1, name, [ChatChunkChoice(2, MessageDelta(content=text), None)])


@pytest.mark.parametrize("record", [completion, chunk])
@pytest.mark.parametrize("name", NAMES)
def test_one_text_differs(record: type, name: str) -> None:
    """A name may hold what stands for the text."""
    made = TextEvent(record(name, TextEvent.HOLE))
    for text in TEXTS:
        assert made.of(text) == event(record(name, text))
