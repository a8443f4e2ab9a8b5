"""One HTTP exchange: reads the body within its caps, runs a handler, sends what it returns, ends it with its client.

Knows ASGI and nothing of what is asked. Handlers return a `Reply`, or a `Stream` whose first event is ready: all that
can be refused has been refused before a status goes out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headway.server.decode import decode_body
from headway.server.errors import ApiError, from_exception
from headway.server.sse import CONTENT_TYPE, DONE, error_event
from headway.server.state import Connection, OpenCall, ServerState

logger = logging.getLogger("headway")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MAX_ID_CHARS = 200


@dataclass(slots=True)
class Call:
    """What a handler may know of the exchange."""

    state: ServerState
    scope: Scope
    open_call: OpenCall | None = None  # of generations

    @property
    def key_id(self) -> str:
        """Who asks, as a digest; empty where no keys are set."""
        return str(self.scope.get("headway.key_id", ""))

    @property
    def request_id(self) -> str:
        """X-Request-Id, or one of ours."""
        return str(self.scope["headway.request_id"])


@dataclass(slots=True)
class Reply:
    """A whole answer."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: bytes = b"application/json"


@dataclass(slots=True)
class Stream:
    """Events as bytes, `first` in hand. An error raised by the others becomes the last event before [DONE]."""

    first: bytes
    events: AsyncGenerator[bytes, None]


Handler = Callable[[Call, Any], Awaitable[Reply | Stream]]
_encode = msgspec.json.Encoder().encode


def json_reply(record: Any, status: int = 200) -> Reply:
    return Reply(_encode(record), status)


def new_id() -> str:
    return os.urandom(12).hex()


class EndpointApp:
    """A handler as an ASGI application. `body_kind` None: no body is read."""

    def __init__(
        self,
        state: ServerState,
        handler: Handler,
        body_kind: Callable[[bytes], type[msgspec.Struct]] | type[msgspec.Struct] | None,
        *,
        is_generation: bool,
    ) -> None:
        self._state = state
        self._handler = handler
        self._body_kind = body_kind
        self._is_generation = is_generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(self._state, scope)
        try:
            record = await self._read(scope, receive)
        except Exception as error:
            await send_reply(send, error_reply(from_exception(error)))
            return
        if self._is_generation:
            await self._answer_while_heard(call, record, send)
        else:
            await self._answer(call, record, send)

    async def _read(self, scope: Scope, receive: Receive) -> Any:
        if self._body_kind is None:
            return None
        body = await read_body(self._state, scope, receive)
        kind = self._body_kind if isinstance(self._body_kind, type) else self._body_kind(body)
        return decode_body(kind, body)

    async def _answer_while_heard(self, call: Call, record: Any, send: Send) -> None:
        """Ends the handler, and with it what it asked of the engine, as soon as the client has gone."""
        task = asyncio.current_task()
        assert task is not None
        connection: Connection = call.scope["headway.connection"]
        call.open_call = open_call = OpenCall(task, connection)
        self._state.open_calls.add(open_call)
        connection.on_gone = open_call.leave
        if connection.is_lost:
            open_call.leave()
        try:
            await self._answer(call, record, send)
        except asyncio.CancelledError:
            if not open_call.is_gone:
                raise
            task.uncancel()
        finally:
            connection.on_gone = None
            self._state.open_calls.discard(open_call)

    async def _answer(self, call: Call, record: Any, send: Send) -> None:
        try:
            reply = await self._handler(call, record)
        except Exception as error:
            reply = error_reply(from_exception(error))
        if isinstance(reply, Stream):
            assert call.open_call is not None
            await send_stream(send, reply, call.open_call)
        else:
            await send_reply(send, reply)


async def read_body(state: ServerState, scope: Scope, receive: Receive) -> bytes:
    """Raises ApiError: not JSON by its type, encoded, too large. One that is too slow ends with its connection."""
    headers = scope["headway.headers"]
    media_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if media_type != b"application/json":
        raise ApiError("unsupported_media_type", "Content-Type must be application/json")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise ApiError("unsupported_media_type", "Content-Encoding is not supported: send the body as it is")
    limit = state.settings.max_body_bytes
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit:
        raise _too_large(limit)
    return await _read_all(receive, limit)


async def _read_all(receive: Receive, limit: int) -> bytes:
    pieces: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError("timeout", "the client went away")
        piece = message.get("body", b"")
        num_bytes += len(piece)
        if num_bytes > limit:
            raise _too_large(limit)
        pieces.append(piece)
        if not message.get("more_body"):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _too_large(limit: int) -> ApiError:
    # Closing is the only way not to read the rest.
    return ApiError("too_large", f"the body is larger than {limit} bytes", headers={"connection": "close"})


def error_reply(error: ApiError) -> Reply:
    return Reply(error.body(), error.status, dict(error.headers))


async def send_reply(send: Send, reply: Reply) -> None:
    headers: Headers = [
        (b"content-type", reply.content_type),
        (b"content-length", str(len(reply.body)).encode()),
        *((name.encode(), value.encode()) for name, value in reply.headers.items()),
    ]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


async def send_stream(send: Send, stream: Stream, call: OpenCall) -> None:
    """Whatever happens, the last event is [DONE]; a failure is told in the event before it."""
    headers: Headers = [(b"content-type", CONTENT_TYPE), (b"cache-control", b"no-cache")]
    connection = call.connection
    async with aclosing(stream.events) as events:
        await _drained(call)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": stream.first, "more_body": True})
        try:
            async for piece in events:
                if connection.is_full:
                    await _drained(call)
                connection.write_chunk(piece)
        except Exception as error:
            connection.write_chunk(error_event(from_exception(error)))
    await _drained(call)
    await send({"type": "http.response.body", "body": DONE})


async def _drained(call: OpenCall) -> None:
    """Waits for a client that has not taken what was sent; whoever watches calls sees since when."""
    call.sending_since_s = time.monotonic()
    await call.connection.drain()
    call.sending_since_s = None
