"""Server-sent events, to the byte: `data: <json>\\n\\n`, and `data: [DONE]\\n\\n` last. No comments, no event names."""

from __future__ import annotations

from typing import Any

import msgspec

from headway.server.errors import ApiError

DONE = b"data: [DONE]\n\n"
CONTENT_TYPE = b"text/event-stream; charset=utf-8"

_encode = msgspec.json.Encoder().encode


def event(record: Any) -> bytes:
    """JSON has no raw line feeds, so that one data line holds it."""
    return b"data: " + _encode(record) + b"\n\n"


class TextEvent:
    """Events that differ in one text alone: what stands around it, most of their bytes, is encoded once.

    Args:
        record: has `HOLE` in the text's place, and no text of a caller's behind it.
    """

    HOLE = "\0"

    def __init__(self, record: Any) -> None:
        self._head, hole, self._tail = event(record).rpartition(_encode(self.HOLE))
        assert hole

    def of(self, text: str) -> bytes:
        return b"%b%b%b" % (self._head, _encode(text), self._tail)


def error_event(error: ApiError) -> bytes:
    """Told in the stream, whose status went out long ago."""
    return b"data: " + error.body() + b"\n\n"
