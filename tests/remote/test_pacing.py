"""How an engine's process passes outputs on: many in turns with a rest in between, few and first ones at once."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from typing import cast

import pytest

from headway.errors import EngineDeadError
from headway.remote import host as hosts
from headway.remote.host import MAX_TICKETS_A_PASS, NUM_TICKETS_WITHOUT_REST, EngineHost
from headway.remote.link import Link
from headway.remote.messages import (
    Close,
    EngineMessage,
    Grown,
    Growth,
    Output,
    Seen,
    ServerMessage,
    engine_messages,
    to_frames,
)
from headway.remote.records import to_add
from headway.request import SamplingParams
from headway.server.client import EngineOutput, EngineRequest
from tests.remote.hosted import FakeHosted, FakeTicket, Options

NUM_MANY = MAX_TICKETS_A_PASS + NUM_TICKETS_WITHOUT_REST + 1


class Engine(FakeHosted):
    """Steps when it is told to."""

    def __init__(self) -> None:
        super().__init__(Options(has_tokenizer=False))
        self.tickets: list[FakeTicket] = []

    def open(self, request: EngineRequest) -> FakeTicket:
        self.tickets.append(FakeTicket(request))
        return self.tickets[-1]

    def grow(self, tickets: Iterable[FakeTicket]) -> None:
        """Each by a token."""
        grown = set(tickets)
        for ticket in grown:
            ticket.num_tokens += 1
        self._on_news(grown)

    def take(self, ticket: FakeTicket) -> list[EngineOutput]:
        """What came before a fault comes first, as `AsyncLLM` has it."""
        error, ticket.error = ticket.error, None
        outputs = super().take(ticket)
        ticket.error = error
        if error is not None and not outputs:
            raise error
        return outputs

    def die(self) -> None:
        self._death = "a fault"
        for ticket in self.tickets:
            ticket.error = EngineDeadError(self._death)
        self._on_news(set(self.tickets))


class Wire:
    """A link whose other end has seen nothing until `hear` is told so."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self._on_frame: Callable[[bytes], None] | None = None

    def attach(self, loop: asyncio.AbstractEventLoop, on_frame: Callable[[bytes], None]) -> None:
        self._on_frame = on_frame

    def send(self, frame: bytes) -> None:
        self.frames.append(frame)

    def hear(self, messages: list[ServerMessage]) -> None:
        assert self._on_frame is not None
        for frame in to_frames(messages, 1 << 20)[0]:
            self._on_frame(frame)

    def see_all(self) -> None:
        self.hear([Seen(1 << 30)])

    def taken(self) -> list[list[Output | Growth]]:
        """Outputs of each frame since the last call."""
        frames, self.frames = self.frames, []
        found = [_outputs(engine_messages(frame)) for frame in frames]
        return [outputs for outputs in found if outputs]

    def taken_numbers(self) -> list[int]:
        return sorted(output.number for outputs in self.taken() for output in outputs)


def _outputs(messages: list[EngineMessage]) -> list[Output | Growth]:
    single: list[Output | Growth] = [m for m in messages if isinstance(m, Output)]
    return single + [growth for m in messages if isinstance(m, Grown) for growth in m.growths]


Test = Callable[[Engine, Wire], Awaitable[None]]


def hosted(num: int, test: Test, *, has_text: bool = True) -> int:
    """Runs a test with so many requests open and a server that has seen whatever comes. The process's exit code.

    Without text, a request that has begun and goes on is passed on as a `Growth`.
    """

    async def body() -> int:
        engine, wire = Engine(), Wire()
        running = asyncio.ensure_future(EngineHost(engine, cast(Link, wire), 60.0).run())
        await asyncio.sleep(0)
        requests = [EngineRequest(str(i), [1], SamplingParams(max_tokens=4000)) for i in range(num)]
        adds = [to_add(1 + i, request, has_text=has_text) for i, request in enumerate(requests)]
        wire.hear([*adds, Seen(1 << 30)])
        await test(engine, wire)
        wire.hear([Close()])
        return await running

    return asyncio.run(asyncio.wait_for(body(), 60))


@pytest.fixture
def long_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that no test sees the end of."""
    monkeypatch.setattr(hosts, "REST_S_A_TICKET", 3600.0)


@pytest.mark.usefixtures("long_rest")
def test_first_outputs_never_wait() -> None:
    async def test(engine: Engine, wire: Wire) -> None:
        engine.grow(engine.tickets[:-1])
        assert wire.taken_numbers() == list(range(1, NUM_MANY))
        engine.grow(engine.tickets)  # while it rests
        assert wire.taken_numbers() == [NUM_MANY]
        engine.grow(engine.tickets)
        assert wire.taken_numbers() == []

    assert hosted(NUM_MANY, test) == 0


@pytest.mark.parametrize("has_text", [True, False])
@pytest.mark.usefixtures("long_rest")
def test_few_streams_have_every_token_at_once(has_text: bool) -> None:
    async def test(engine: Engine, wire: Wire) -> None:
        for _ in range(100):
            engine.grow(engine.tickets)
            assert wire.taken_numbers() == list(range(1, 1 + NUM_TICKETS_WITHOUT_REST))

    assert hosted(NUM_TICKETS_WITHOUT_REST, test, has_text=has_text) == 0


@pytest.mark.parametrize("has_text", [True, False])
def test_many_streams_go_in_turns_and_lose_nothing(monkeypatch: pytest.MonkeyPatch, has_text: bool) -> None:
    monkeypatch.setattr(hosts, "REST_S_A_TICKET", 0.0)

    async def test(engine: Engine, wire: Wire) -> None:
        engine.grow(engine.tickets)
        first = wire.taken()
        for _ in range(30):
            engine.grow(engine.tickets)
            engine.grow(engine.tickets)
            await asyncio.sleep(0)
        while any(ticket.num_taken < ticket.num_tokens for ticket in engine.tickets):
            await asyncio.sleep(0)
        rest = wire.taken()
        assert max(len(outputs) for outputs in rest) == MAX_TICKETS_A_PASS
        tokens: dict[int, list[int]] = defaultdict(list)
        for output in itertools.chain(*first, *rest):
            tokens[output.number] += output.token_ids
        assert list(tokens.values()) == [[i % 26 for i in range(61)]] * NUM_MANY

    assert hosted(NUM_MANY, test, has_text=has_text) == 0


@pytest.mark.parametrize("has_text", [True, False])
@pytest.mark.usefixtures("long_rest")
def test_what_came_before_a_fault_does_not_wait_for_the_rest(has_text: bool) -> None:
    found: list[int] = []

    async def test(engine: Engine, wire: Wire) -> None:
        engine.grow(engine.tickets)
        engine.grow(engine.tickets)
        found.extend(wire.taken_numbers())
        assert len(found) == NUM_MANY
        engine.die()
        while len(found) < 2 * NUM_MANY:
            await asyncio.sleep(0.01)
            found.extend(wire.taken_numbers())

    assert hosted(NUM_MANY, test, has_text=has_text) == 1
    assert sorted(found) == sorted(2 * list(range(1, 1 + NUM_MANY)))
