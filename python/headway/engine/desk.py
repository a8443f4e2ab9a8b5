"""Where requests from an event loop meet an engine's thread: tickets, who is woken when, what happens when one dies.

Nothing is queued in between: a completion keeps its tokens, and who reads it takes what has come since. A slow reader
so gets fewer and larger deltas, holds nobody up, and costs no memory beyond its own tokens.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from headway.engine.background import EngineThread
from headway.engine.completion import Completion, Request
from headway.engine.engine import CheckedRequest, Engine
from headway.engine.meter import StepMeter
from headway.errors import EngineDeadError, HeadwayError, OverloadedError, RequestError
from headway.outputs import Delta, PromptLogprobs, RequestOutput
from headway.request import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from headway._core import Commit
    from headway.engine.stages import Stages

RETRY_AFTER_S = 1.0


class Ticket:
    """One request: its reader holds the ticket on the loop, the engine's thread fills it."""

    def __init__(self, checked: CheckedRequest) -> None:
        self.checked = checked
        self.has_news = asyncio.Event()
        self.is_left = False
        self._has_taken_prompt_logprobs = False
        self.is_over = False  # its last delta was taken
        self.request: Request | None = None  # once queued
        self.unread: list[Completion] = []  # whose last delta has not been taken
        self.error: HeadwayError | None = None

    @property
    def params(self) -> SamplingParams:
        return self.checked.params

    @property
    def queued(self) -> Request:
        assert self.request is not None
        return self.request

    def take_prompt_logprobs(self) -> PromptLogprobs | None:
        """Once, with the first output of the first completion: they are complete by then."""
        taken, self._has_taken_prompt_logprobs = self._has_taken_prompt_logprobs, True
        return None if taken else self.queued.prompt_logprobs

    def wants_news(self) -> bool:
        is_patient = self.params.output_kind == RequestOutputKind.FINAL_ONLY
        return not is_patient or self.request is None or self.request.is_finished


@dataclass(frozen=True, slots=True)
class Changed:
    """What a step changed, and who is told."""

    completions: list[Completion]
    tickets: set[Ticket]


class RequestDesk:
    """Takes requests from one event loop at a time and runs them on a thread of its own.

    Args:
        engine: nobody else's from now on.
        max_open: completions that may be open; None: no limit.

    Attributes:
        death: why nothing works any more.
        closing: why nothing more is taken, in words.
        on_news: called on the loop with the tickets that have news, in place of waking the reader of each.
        stages: the engine's, with what the desk needs around them.
    """

    def __init__(self, engine: Engine, max_open: int | None) -> None:
        self.death: EngineDeadError | None = None
        self.closing = ""
        self.on_news: Callable[[set[Ticket]], None] | None = None
        self.meter = StepMeter()
        self._engine = engine
        self._max_open = max_open
        self._num_open = 0
        self._tickets: dict[str, Ticket] = {}
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()  # held while completions grow, end or are read, and for `_news`
        self._news: set[Ticket] = set()
        self._changed: Changed | None = None  # by the last step, while somebody is there
        self.stages = engine.stages = self.meter.around(self._locked(engine.stages))
        self._thread = EngineThread(engine, self.meter, self._on_change, self._on_death)
        self._thread.start()

    def open(
        self,
        request_id: str,
        prompt: str | None,
        token_ids: Sequence[int],
        params: SamplingParams,
        priority: int,
        cache_salt: str | None = None,
        use_prefix_cache: bool = True,
    ) -> Ticket:
        """Checks a request and sends it to the engine. Whoever opens a ticket must leave it."""
        self._bind_loop()
        self._refuse_if_dead()
        checked = self._engine.check(
            request_id,
            0,
            prompt,
            token_ids,
            params,
            priority,
            cache_salt=cache_salt,
            uses_prefix_cache=use_prefix_cache,
        )
        if request_id in self._tickets:
            raise RequestError("request_id", request_id, "unique among the requests that are not over")
        self._refuse_if_full(params.n)
        ticket = Ticket(checked)
        self._tickets[request_id] = ticket
        self._num_open += params.n
        self._is_empty.clear()
        self._thread.post(lambda: self._queue(ticket))
        return ticket

    async def next_deltas(self, ticket: Ticket) -> list[Delta]:
        """Waits for news of the request; may be empty. Sets `is_over` with the last of them."""
        await ticket.has_news.wait()
        ticket.has_news.clear()
        return self.take_deltas(ticket)

    def take_deltas(self, ticket: Ticket) -> list[Delta]:
        """What has come since the last call. Raises the ticket's error once there is nothing before it."""
        if ticket.request is not None:
            with self._lock:
                deltas = [delta for c in ticket.unread if (delta := c.take_delta()) is not None]
                ticket.unread = [c for c in ticket.unread if not c.is_read]
            ticket.is_over = not ticket.unread
            if ticket.error is not None:
                ticket.has_news.set()  # it comes after the last of the deltas
            if deltas or ticket.is_over:
                return deltas
        if ticket.error is not None:
            raise ticket.error
        return []

    def take_tokens(self, ticket: Ticket) -> list[int]:
        """`take_deltas` for less, of one completion without text that merely goes on; else empty."""
        if ticket.error is not None or ticket.params.n != 1 or not ticket.unread:
            return []
        with self._lock:
            return ticket.unread[0].take_tokens()

    def output(self, ticket: Ticket) -> RequestOutput:
        with self._lock:
            return ticket.queued.output()

    def leave(self, ticket: Ticket) -> None:
        """The reader wants no more: what is not over ends. Legal twice."""
        if ticket.is_left:
            return
        ticket.is_left = True
        del self._tickets[ticket.checked.request_id]
        self._num_open -= ticket.params.n
        if not self._tickets:
            self._is_empty.set()
            self._changed = None
        if not ticket.is_over:
            self._thread.post(lambda: self._end(ticket))

    def abort(self, request_id: str) -> bool:
        """Ends a request, to whose reader goes what there is. False when it is unknown or over."""
        ticket = self._tickets.get(request_id)
        if ticket is None or ticket.is_over:
            return False
        self._thread.post(lambda: self._end(ticket))
        return True

    async def call(self, action: Callable[[Engine], None]) -> None:
        """Runs `action` between two steps and returns when it has."""
        self._refuse_if_dead()
        loop, is_done = asyncio.get_running_loop(), asyncio.Event()

        def run() -> None:
            action(self._engine)
            loop.call_soon_threadsafe(is_done.set)

        self._thread.post(run)
        await is_done.wait()

    async def drain(self) -> None:
        """Takes no more requests; returns when every ticket was left."""
        self.closing = self.closing or "the engine is draining"
        await self._is_empty.wait()

    async def close(self) -> None:
        """Ends all requests, the thread and the engine. Legal twice."""
        self.closing = "the engine is closed"
        await asyncio.to_thread(self.stop)
        with self._lock:
            self._engine.close()
        for ticket in self._tickets.values():
            if ticket.request is None:
                ticket.error = ticket.error or EngineDeadError(self.closing)
            ticket.has_news.set()

    def stop(self) -> None:
        """Ends the thread, after the step that runs."""
        self._thread.stop()

    def _bind_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop and self._tickets:
            raise RuntimeError("an AsyncLLM serves one event loop at a time, and another one's requests run")
        self._loop = loop

    def _refuse_if_dead(self) -> None:
        if self.death is not None:
            raise EngineDeadError(str(self.death), hint="create a new engine") from self.death

    def _refuse_if_full(self, num_completions: int) -> None:
        if self.closing:
            raise OverloadedError(self.closing, retry_after_s=RETRY_AFTER_S)
        if self._max_open is not None and self._num_open + num_completions > self._max_open:
            raise OverloadedError(
                f"{self._num_open} completions are open, and at most {self._max_open} may be",
                retry_after_s=RETRY_AFTER_S,
            )

    # What follows runs on the engine's thread.

    def _queue(self, ticket: Ticket) -> None:
        if ticket.is_left:
            return
        try:
            request = self._engine.submit(ticket.checked)
        except HeadwayError as error:
            ticket.error = error
            self._tell({ticket})
            return
        self.meter.take(len(request.prompt_token_ids))
        ticket.unread = list(request.completions)
        ticket.request = request

    def _end(self, ticket: Ticket) -> None:
        if ticket.request is not None:
            with self._lock:
                self._engine.abort(ticket.request)
            self._tell({ticket})

    def _on_change(self, changed: list[Completion]) -> None:
        """Steps in which the same rows go on hand in the same list."""
        last = self._changed
        if last is None or last.completions is not changed:
            tickets = {self._tickets.get(completion.request.request_id) for completion in changed}
            last = Changed(changed, {t for t in tickets if t is not None and t.wants_news()})
            self._changed = last
        self._tell(last.tickets)

    def _on_death(self, death: EngineDeadError) -> None:
        self.death = death
        tickets = set(self._tickets.values())
        for ticket in tickets:
            ticket.error = EngineDeadError(str(death), hint="create a new engine")
            ticket.error.__cause__ = death
        self._tell(tickets)

    def _tell(self, tickets: set[Ticket]) -> None:
        """Wakes readers: one call into the loop, however many they are and however late it runs."""
        with self._lock:
            is_called = bool(self._news)
            self._news |= tickets
        if is_called or not tickets or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._wake_readers)
        except RuntimeError:  # the loop is closed, and all who read with it
            self._abandon()

    def _abandon(self) -> None:
        for ticket in list(self._tickets.values()):
            if ticket.request is not None:
                self._engine.abort(ticket.request)
            self.leave(ticket)
        self._news.clear()

    def _wake_readers(self) -> None:
        with self._lock:
            tickets, self._news = self._news, set()
        if self.on_news is not None:
            self.on_news(tickets)
            return
        for ticket in tickets:
            ticket.has_news.set()

    def _locked(self, stages: Stages) -> Stages:
        """Outputs grow under the lock."""

        def outputs(commit: Commit, now_s: float) -> list[Completion]:
            with self._lock:
                return stages.outputs(commit, now_s)

        return replace(stages, outputs=outputs)
