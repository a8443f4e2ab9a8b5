"""What has come for one request and was not read yet. A slow reader finds fewer and larger outputs."""

from __future__ import annotations

import asyncio

from headway.errors import HeadwayError
from headway.remote.messages import Output
from headway.remote.records import joined, to_engine_output
from headway.server.client import EngineOutput

MAX_PARTS = 64  # kept apart; more are joined, so that what waits weighs little beyond its own tokens


class Reading:
    """One request's outputs on their way to its reader, on one event loop.

    Attributes:
        number: what the engine knows the request by.
        has_ended: the engine has nothing more for it.
        is_over: its reader has all of it.
    """

    def __init__(self, number: int, request_id: str, num_completions: int) -> None:
        self.number = number
        self.request_id = request_id
        self.has_ended = False
        self.is_over = False
        self._num_open = num_completions
        self._error: HeadwayError | None = None
        self._parts: dict[int, list[Output]] = {}  # by completion
        self._waiter: asyncio.Future[None] | None = None  # of the reader, where it waits

    def add(self, output: Output) -> None:
        parts = self._parts.setdefault(output.index, [])
        parts.append(output)
        if len(parts) >= MAX_PARTS:
            parts[:] = [joined(parts)]
        if output.finish_reason is not None:
            self._num_open -= 1
            self.has_ended = self._num_open == 0
        self._wake()

    def fail(self, error: HeadwayError) -> None:
        """Its reader gets what has come and then the error, unless all had come."""
        if not self.has_ended:
            self.has_ended = True
            self._error = error
            self._wake()

    async def take(self) -> list[EngineOutput]:
        """Waits for news. Sets `is_over` with the last of them; raises what ended the request early."""
        if not self._parts:
            if self._error is None:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            if not self._parts:
                raise self._taken_error()
        parts, self._parts = self._parts, {}
        self.is_over = self.has_ended and self._error is None
        return [to_engine_output(self.request_id, joined(found)) for found in parts.values()]

    def _taken_error(self) -> HeadwayError:
        """Kept no longer: with its traceback it would keep every frame up to the reader's, in a cycle."""
        error, self._error = self._error, None
        assert error is not None
        return error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
