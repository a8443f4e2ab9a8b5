"""An engine without a model in a process of its own: one letter a request and step.

Options say how it works and how it fails; `headway.remote` around it is the real one.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from headway import errors
from headway.errors import EngineDeadError, HeadwayError, OverloadedError, RequestError
from headway.outputs import RequestMetrics, StepSpan
from headway.remote.child import Progress
from headway.request import RequestOutputKind, SamplingParams
from headway.server.client import EngineOutput, EngineRequest, EngineStats, Health, ModelInfo, Usage
from headway.text import ChatTemplate, Tokenizer
from tests.server.fake_engine import ASSETS

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letter_ids(tokenizer: Tokenizer | None) -> list[int]:
    """Of each of LETTERS; any ids where there is no tokenizer."""
    if tokenizer is None:
        return list(range(26))
    return [token_id for letter in LETTERS for token_id in tokenizer.encode(letter, add_special_tokens=False)]


@dataclass
class Options:
    """Keywords of `RemoteEngine`, as the process gets them.

    Attributes:
        max_waiting: requests beyond num_rows, who wait in the order of their coming; unset: all have rows.
        max_steps: then it stands still with `stall`: "idle" for ever, "fault" dies, "hold" keeps the interpreter,
            "nonsense" sends outputs of a wrong type.
        fails_with: name of an error that the start ends with; "exit" ends the process, "bug" is none of ours.
    """

    model: str | None = None
    max_waiting: int | None = None
    num_rows: int | None = None
    step_s: float = 0.0
    max_steps: int | None = None
    stall: str = "idle"
    fails_with: str = ""
    start_s: float = 0.0
    has_tokenizer: bool = True


@dataclass(eq=False)
class FakeTicket:
    request: EngineRequest
    num_tokens: int = 0
    num_taken: int = 0
    end: str = ""
    is_over: bool = False
    error: HeadwayError | None = None
    arrival_s: float = field(default_factory=time.perf_counter)

    @property
    def wants_news(self) -> bool:
        """Whole answers are told of once."""
        return bool(self.end) or self.request.params.output_kind != RequestOutputKind.FINAL_ONLY


class FakeHosted:
    """See `HostedEngine`. A request of "cancel" in its salt is refused when it is opened."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._live: dict[FakeTicket, None] = {}
        self._on_news: Callable[[set[FakeTicket]], None] = lambda tickets: None
        self._has_work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._num_steps = self._num_finished = 0
        self._moved_s: float | None = None
        self._death = ""
        self.tokenizer = Tokenizer.from_dir(ASSETS) if options.has_tokenizer else None
        self.chat_template = ChatTemplate.find(ASSETS) if options.has_tokenizer else None
        self.token_ids = letter_ids(self.tokenizer)

    @property
    def info(self) -> ModelInfo:
        return ModelInfo("fake", "none", "cpu", "float32", 2048, 4096, 20, 0, (2,), SamplingParams())

    def listen(self, on_news: Callable[[set[FakeTicket]], None]) -> None:
        self._on_news = on_news

    async def prepare(self, params: SamplingParams) -> None:
        raise RequestError("structured_outputs", "any", "unset here")

    def open(self, request: EngineRequest) -> FakeTicket:
        if self._task is None:
            self._task = asyncio.ensure_future(self._run())
        limit = self._options.max_waiting
        if limit is not None and len(self._live) >= (self._options.num_rows or 0) + limit:
            raise OverloadedError("too many", retry_after_s=3)
        if request.cache_salt == "cancel":
            raise RequestError("cache_salt", request.cache_salt, "something else")
        ticket = FakeTicket(request)
        self._live[ticket] = None
        self._moved_s = self._moved_s or time.perf_counter()
        self._has_work.set()
        return ticket

    def take(self, ticket: FakeTicket) -> list[EngineOutput]:
        if ticket.error is not None:
            raise ticket.error
        begin, end = ticket.num_taken, ticket.num_tokens
        if begin == end and not ticket.end:
            return []
        ticket.num_taken = end
        ticket.is_over = bool(ticket.end)
        request = ticket.request
        return [
            EngineOutput(
                request_id=request.request_id,
                index=0,
                text="".join(LETTERS[i % 26] for i in range(begin, end)) if request.params.detokenize else "",
                token_ids=[self.token_ids[i % 26] for i in range(begin, end)],
                usage=Usage(len(request.prompt_token_ids), end, 0),
                finish_reason=ticket.end or None,
                metrics=self._metrics(ticket) if ticket.end else None,
            )
        ]

    def take_tokens(self, ticket: FakeTicket) -> list[int]:
        begin, end = ticket.num_taken, ticket.num_tokens
        if not begin or ticket.end or ticket.error is not None or ticket.request.params.detokenize:
            return []
        ticket.num_taken = end
        return [self.token_ids[i % 26] for i in range(begin, end)]

    def leave(self, ticket: FakeTicket) -> None:
        self._live.pop(ticket, None)

    async def abort(self, request_id: str) -> bool:
        for ticket in list(self._live):
            if ticket.request.request_id == request_id:
                self._end(ticket, "abort")
                self._on_news({ticket})
        return True

    async def stats(self) -> EngineStats:
        free = 1000 - len(self._live)
        return EngineStats(
            0, len(self._live), 0, 1000, free, 0, 8, 8, 0, self._num_steps, self._num_steps, 0,
            self._num_finished, 0, 0, 0.0, 0.0, self._stalled_s,
        )  # fmt: skip

    async def recent_steps(self) -> list[StepSpan]:
        return [StepSpan(self._num_steps, 0, 1, len(self._live), len(self._live), len(self._live))]

    async def health(self) -> Health:
        return Health(not self._death, not self._death, self._death, self._stalled_s)

    async def reset_prefix_cache(self) -> bool:
        return not self._live

    async def start_profile(self) -> None:
        raise RequestError("profile", "start", "possible")

    async def stop_profile(self) -> str:
        return "{}"

    async def close(self) -> None:
        return None

    @property
    def _stalled_s(self) -> float:
        return time.perf_counter() - self._moved_s if self._live and self._moved_s else 0.0

    @staticmethod
    def _metrics(ticket: FakeTicket) -> RequestMetrics:
        return RequestMetrics(
            ticket.arrival_s, time.perf_counter(), time.perf_counter(), 1, ticket.num_tokens
        )

    async def _run(self) -> None:
        while True:
            await self._has_work.wait()
            await asyncio.sleep(self._options.step_s)
            if not self._live:
                self._has_work.clear()
                self._moved_s = None
            elif self._num_steps == self._options.max_steps:
                await self._stand_still()
            else:
                self._step()

    def _step(self) -> None:
        self._num_steps += 1
        self._moved_s = time.perf_counter()
        tickets = set(itertools.islice(self._live, self._options.num_rows))
        for ticket in tickets:
            ticket.num_tokens += 1
            if ticket.num_tokens == (ticket.request.params.max_tokens or 32):
                self._end(ticket, "length")
        self._on_news({ticket for ticket in tickets if ticket.wants_news})

    def _end(self, ticket: FakeTicket, reason: str) -> None:
        ticket.end = reason
        self._num_finished += 1
        del self._live[ticket]

    async def _stand_still(self) -> None:
        if self._options.stall == "hold":
            ctypes.PyDLL(None).sleep(60)  # with the interpreter's lock
        if self._options.stall == "nonsense":
            for ticket in self._live:
                ticket.num_tokens += 1
                ticket.end = "because"
            self._on_news(set(self._live))
        if self._options.stall == "fault":
            self._death = "the engine stopped: a fault"
            for ticket in self._live:
                ticket.error = EngineDeadError(self._death)
            self._on_news(set(self._live))
        await asyncio.sleep(3600)


def make(options: dict[str, Any], progress: Progress) -> FakeHosted:
    found = Options(**options)
    progress(0, 2)
    time.sleep(found.start_s)
    progress(2, 2)
    if found.fails_with == "exit":
        os._exit(7)
    if found.fails_with == "bug":
        raise TypeError("that was not expected")
    if found.fails_with:
        raise getattr(errors, found.fails_with)("it cannot start", hint="change something")
    return FakeHosted(found)
