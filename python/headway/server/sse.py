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


def error_event(error: ApiError) -> bytes:
    """Told in the stream, whose status went out long ago."""
    return b"data: " + error.body() + b"\n\n"
