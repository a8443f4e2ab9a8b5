"""uvicorn's HTTP/1.1 protocol with bounds of its own: on headers, on the time they take, on connections.

What does not get as far as the application is answered here, in the same envelope as everything else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from headway.server.errors import ApiError
from headway.server.settings import ServerSettings


class OneWrite:
    """A cycle's transport until its reply has begun: head and first part of the body leave in one write."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._transport = cycle.transport
        self._head = b""

    def write(self, data: bytes) -> None:
        if not self._cycle.response_started:  # 100 Continue
            self._transport.write(data)
        elif not self._head:
            self._head = data
        else:
            self._transport.write(self._head + data)
            self._cycle.transport = self._transport

    def close(self) -> None:
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


class LimitedProtocol(HttpToolsProtocol):
    """One connection. Its limits are those of the application's settings."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._settings: ServerSettings = config.loaded_app.settings
        self._num_header_bytes = 0
        self._num_headers = 0
        self._awaited = ""  # what the client has begun and not ended: "headers" or "body"
        self._awaited_since_s = 0.0
        self._is_refused = False
        self.on_gone: Callable[[], None] | None = None
        self.is_lost = False

    @property
    def is_full(self) -> bool:
        return self.flow.write_paused

    async def drain(self) -> None:
        await self.flow.drain()

    def write_chunk(self, data: bytes) -> None:
        if not self.is_lost:
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def cut(self) -> None:
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._settings.max_connections:
            self._refuse(ApiError("unavailable", "too many connections are open", code="overloaded"))
        else:
            self._await("headers")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.is_lost = True
        if self.on_gone is not None:
            self.on_gone()

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["headway.connection"] = self  # type: ignore[typeddict-unknown-key]
        self._num_header_bytes = self._num_headers = 0
        self._await("headers")

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._num_headers += 1
        self._count(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        if not self._is_refused:
            super().on_headers_complete()
            self._await("body")
            if self.scope["method"] != "HEAD":  # which has no body to wait for
                self.cycle.transport = OneWrite(self.cycle)  # type: ignore[assignment]  # as much as a cycle uses

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._awaited = ""
        if not self._is_refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError("bad_request", "the request is not valid HTTP", code="invalid_http"))

    def _count(self, num_bytes: int) -> None:
        """Trailers of a chunked body count as well."""
        self._num_header_bytes += num_bytes
        settings = self._settings
        if self._num_header_bytes > settings.max_header_bytes or self._num_headers > settings.max_headers:
            limits = f"{settings.max_header_bytes} bytes and {settings.max_headers} lines"
            self._refuse(ApiError("headers_too_large", f"headers may have {limits}"))

    def _await(self, what: str) -> None:
        self._awaited, self._awaited_since_s = what, self.loop.time()

    def refuse_if_late(self, now_s: float) -> None:
        """To be called now and then, which costs less than a timer for every request. `now_s`: of the loop's clock."""
        limit_s = self._settings.read_timeout_s
        if not self._awaited or now_s - self._awaited_since_s <= limit_s:
            return
        if self._awaited == "body" and self.cycle.response_complete:  # of an answer that did not need it
            self.transport.close()
        else:
            self._refuse(ApiError("timeout", f"the {self._awaited} did not arrive within {limit_s:g} s"))

    def _refuse(self, error: ApiError) -> None:
        """Answers and closes, unless an earlier request of this connection is being answered: then it just closes."""
        if self._is_refused:
            return
        self._is_refused = True
        cycle = self.cycle
        is_current = (
            cycle is not None and cycle.more_body and not cycle.response_started and not self.pipeline
        )
        if cycle is None or cycle.response_complete or is_current:
            self.transport.write(_reply(error))
        self.transport.close()


def _reply(error: ApiError) -> bytes:
    body = error.body()
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
