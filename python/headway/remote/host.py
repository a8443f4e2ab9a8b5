"""An engine's own process, once the engine is there: passes on what the server asks and what the engine makes.

All that is new goes out in one frame, and no more frames than the server has seen lately: while it reads slowly, tokens
wait where they came into being and go together. The engine never waits for that, and of the interpreter, which the
thread that launches its steps needs too, passing on takes a share only: after many outputs it rests.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Hashable
from typing import Generic, Protocol, TypeVar

from headway.errors import EngineDeadError, HeadwayError, RequestError
from headway.remote.faults import to_fault
from headway.remote.link import Link
from headway.remote.messages import (
    MAX_ENGINE_FRAME_BYTES,
    Abort,
    Add,
    Ask,
    Beat,
    Close,
    EngineMessage,
    Failed,
    FaultAnswer,
    FlagAnswer,
    Grown,
    Growth,
    Leave,
    Output,
    Refused,
    Seen,
    ServerMessage,
    StatsAnswer,
    StepsAnswer,
    TextAnswer,
    server_messages,
    to_frames,
)
from headway.remote.records import to_output, to_request
from headway.remote.watchdog import Watchdog
from headway.request import SamplingParams
from headway.server.client import EngineHandle, EngineOutput, EngineRequest

logger = logging.getLogger("headway")

BEAT_S = 0.25
MAX_UNSEEN_FRAMES = 4
MAX_UNSEEN_BEATS = 8  # beats go on for a while: they are small
LAST_WORDS_S = 1.0

# A pass takes some 1 us a ticket of the interpreter, 8 where it has more to tell than tokens, and the engine's thread
# cannot launch a step meanwhile. The rest leaves 25,000 outputs a second: a core of the server writes some more, and is
# to have time for the requests that come in place of those that end.
MAX_TICKETS_A_PASS = 64
NUM_TICKETS_WITHOUT_REST = 16
REST_S_A_TICKET = 40e-6
MAX_GROWTHS_A_MESSAGE = 16  # the server takes up other things between two messages


class Opened(Hashable, Protocol):
    """A request in a hosted engine; `headway.engine.desk.Ticket`."""

    @property
    def is_over(self) -> bool: ...
    @property
    def error(self) -> HeadwayError | None: ...


T = TypeVar("T", bound=Opened)


class HostedEngine(EngineHandle, Protocol[T]):
    """What a process needs of the engine in it: `AsyncLLM`. Where a server's client streams a request, it passes on
    those of all requests at once.
    """

    def listen(self, on_news: Callable[[set[T]], None]) -> None: ...
    async def prepare(self, params: SamplingParams) -> None: ...
    def open(self, request: EngineRequest) -> T: ...
    def take(self, ticket: T) -> list[EngineOutput]: ...
    def take_tokens(self, ticket: T) -> list[int]: ...
    def leave(self, ticket: T) -> None: ...


class EngineHost(Generic[T]):
    """Serves one server over one link until it is told to close or the engine dies."""

    def __init__(self, engine: HostedEngine[T], link: Link, watchdog_timeout_s: float) -> None:
        self._engine: HostedEngine[T] = engine
        self._link = link
        self._watchdog = Watchdog(watchdog_timeout_s)
        self._tickets: dict[int, T] = {}
        self._numbers: dict[T, int] = {}
        self._ids: dict[int, str] = {}
        self._preparing: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._news: dict[T, None] = {}  # who has some, in the order of its coming
        self._silent: set[T] = set()  # of whom nothing has been passed on
        self._rest: asyncio.TimerHandle | None = None  # while it runs
        self._messages: list[EngineMessage] = []
        self._num_sent = 0
        self._num_seen = 0
        self._is_over = asyncio.Event()
        self._death: HeadwayError | None = None

    async def run(self) -> int:
        """The process's exit code."""
        self._engine.listen(self._on_news)
        self._link.attach(asyncio.get_running_loop(), self._on_frame)
        beats = asyncio.ensure_future(self._beat())
        await self._is_over.wait()
        beats.cancel()
        self._watchdog.stop()
        if self._death is None:
            await self._engine.close()
            return 0
        logger.error("the engine stopped: %s", self._death)
        self._pass_on([ticket for ticket in self._news if ticket.error is not None])  # what came before it
        self._link.send(to_frames([Failed(to_fault(self._death))], MAX_ENGINE_FRAME_BYTES)[0][0])
        return 1

    # --- from the server ------------------------------------------------------------------------------------------

    def _on_frame(self, frame: bytes) -> None:
        try:
            for message in server_messages(frame):
                self._on_message(message)
        except HeadwayError as error:
            self._die(error)
        self._pump()

    def _on_message(self, message: ServerMessage) -> None:
        if isinstance(message, Add):
            self._add(message)
        elif isinstance(message, Leave):
            self._leave(message.number)
        elif isinstance(message, Abort):
            if message.number in self._ids:
                self._spawn(self._abort(self._ids[message.number]))
        elif isinstance(message, Ask):
            self._spawn(self._answer(message))
        elif isinstance(message, Seen):
            self._num_seen = max(self._num_seen, message.num_frames)
        elif isinstance(message, Close):
            self._is_over.set()

    def _add(self, message: Add) -> None:
        try:
            request = to_request(message)
        except RequestError as error:
            self._refuse(message.number, error)
            return
        if request.params.structured_outputs is None:
            self._open(message.number, request)
        else:
            self._preparing[message.number] = asyncio.ensure_future(self._prepare(message.number, request))

    async def _prepare(self, number: int, request: EngineRequest) -> None:
        """What takes time before a request can be opened holds up that request alone."""
        try:
            await self._engine.prepare(request.params)
        except HeadwayError as error:
            self._refuse(number, error)
        else:
            self._open(number, request)
        finally:
            del self._preparing[number]
        self._pump()

    def _open(self, number: int, request: EngineRequest) -> None:
        try:
            ticket = self._engine.open(request)
        except HeadwayError as error:
            self._refuse(number, error)
            return
        self._tickets[number] = ticket
        self._numbers[ticket] = number
        self._ids[number] = request.request_id
        self._silent.add(ticket)

    def _leave(self, number: int) -> None:
        """Legal for a request that is over: that may have crossed on the way."""
        if (task := self._preparing.get(number)) is not None:
            task.cancel()
        if (ticket := self._tickets.get(number)) is not None:
            self._forget(number, ticket)

    async def _abort(self, request_id: str) -> None:
        await self._engine.abort(request_id)

    async def _answer(self, ask: Ask) -> None:
        try:
            answer = await self._found(ask)
        except HeadwayError as error:
            answer = FaultAnswer(ask.call, to_fault(error))
        self._messages.append(answer)
        self._pump()

    async def _found(self, ask: Ask) -> EngineMessage:
        engine, call = self._engine, ask.call
        match ask.question:
            case "stats":
                return StatsAnswer(call, await engine.stats())
            case "recent_steps":
                return StepsAnswer(call, await engine.recent_steps())
            case "reset_prefix_cache":
                return FlagAnswer(call, await engine.reset_prefix_cache())
            case "start_profile":
                await engine.start_profile()
                return TextAnswer(call, "")
            case "stop_profile":
                return TextAnswer(call, await engine.stop_profile())

    # --- from the engine ------------------------------------------------------------------------------------------

    def _on_news(self, tickets: set[T]) -> None:
        self._news.update(dict.fromkeys(tickets))
        self._pump()

    def _pump(self) -> None:
        """Sends what is new unless the server has enough to read. After many outputs it rests: the thread that launches
        steps has the interpreter, and outputs grow. First outputs, answers and refusals never wait for that.
        """
        if self._num_sent - self._num_seen >= MAX_UNSEEN_FRAMES:
            return
        due = self._due()
        self._pass_on(due)
        if self._rest is None and len(due) > NUM_TICKETS_WITHOUT_REST:
            rest_s = REST_S_A_TICKET * len(due)
            self._rest = asyncio.get_running_loop().call_later(rest_s, self._end_rest)

    def _due(self) -> list[T]:
        """Who is passed on now; who waits longest comes before others. They stay in the news until then."""
        first = list(self._news.keys() & self._silent) if self._silent else []
        if self._rest is not None:
            return first
        others = (ticket for ticket in self._news if ticket not in self._silent)
        return first + list(itertools.islice(others, MAX_TICKETS_A_PASS))

    def _pass_on(self, tickets: list[T]) -> None:
        growths: list[Growth] = []
        for ticket in tickets:
            del self._news[ticket]
            if (number := self._numbers.get(ticket)) is None:
                continue
            if token_ids := self._engine.take_tokens(ticket):
                growths.append(Growth(number, token_ids))
            else:
                self._take(number, ticket)
        for begin in range(0, len(growths), MAX_GROWTHS_A_MESSAGE):
            self._messages.append(Grown(growths[begin : begin + MAX_GROWTHS_A_MESSAGE]))
        messages, self._messages = self._messages, []
        if messages:
            self._send(messages)

    def _end_rest(self) -> None:
        self._rest = None
        self._pump()

    def _take(self, number: int, ticket: T) -> None:
        num_messages = len(self._messages)
        try:
            self._messages += [to_output(number, output) for output in self._engine.take(ticket)]
            if not ticket.is_over and ticket.error is not None:
                self._messages += [to_output(number, output) for output in self._engine.take(ticket)]
        except HeadwayError as error:
            self._refuse(number, error)
            self._forget(number, ticket)
            if isinstance(error, EngineDeadError):
                self._die(error)
        else:
            if len(self._messages) > num_messages:
                self._silent.discard(ticket)
            if ticket.is_over:
                self._forget(number, ticket)

    def _forget(self, number: int, ticket: T) -> None:
        del self._tickets[number], self._numbers[ticket], self._ids[number]
        self._silent.discard(ticket)
        self._engine.leave(ticket)

    def _refuse(self, number: int, error: HeadwayError) -> None:
        self._messages.append(Refused(number, to_fault(error)))

    def _send(self, messages: list[EngineMessage]) -> None:
        frames, too_large = to_frames(messages, MAX_ENGINE_FRAME_BYTES)
        for message in too_large:
            if isinstance(message, Output):
                limit = f"so few that an output has at most {MAX_ENGINE_FRAME_BYTES} bytes"
                self._refuse(message.number, RequestError("logprobs", "more", limit))
                self._leave(message.number)
        for frame in frames:
            self._num_sent += 1
            self._link.send(frame)

    # --- life and death -------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        while True:
            health = await self._engine.health()
            if not health.is_alive:
                self._die(EngineDeadError(health.reason))
            elif self._watchdog.has_expired(health.seconds_since_progress):
                self._die(self._watchdog.expire(health.seconds_since_progress))
            elif self._num_sent - self._num_seen < MAX_UNSEEN_BEATS:
                self._send([Beat(await self._engine.stats(), health)])
            await asyncio.sleep(BEAT_S)

    def _die(self, error: HeadwayError) -> None:
        if self._death is None:
            self._death = error
            self._is_over.set()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        """The loop alone would not keep it alive."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
