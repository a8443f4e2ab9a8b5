"""Who leaves, at whatever stage, costs nobody anything: his memory is free within two steps, his neighbours' tokens are
theirs, and he hears of his end once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from headway.engine.desk import RequestDesk
from headway.request import SamplingParams
from headway.server.client import EngineOutput, EngineRequest
from tests.server.live import Live, live, read_all, wait_until
from tests.server.scorecard import num_open_files, record
from tests.server.small_engine import SmallEngine, expected_tokens
from tests.server.test_lifecycle import posted

MAX_ROWS = 3
COUNTS = [6, pytest.param(500, marks=pytest.mark.long)]
LONG_PROMPT = [5 + i % 40 for i in range(60)]  # of four steps
SHORT_PROMPT = [7, 8, 9]
NEIGHBOUR_TOKENS = 30  # more than the steps of a round


@dataclass(frozen=True)
class Stage:
    """Where a request is when it is given up.

    Attributes:
        num_neighbours: that run beside it; as many as there are rows make it wait in the queue.
        num_steps: that ran since it came; one more is on the device.
        count: of the ledger's stats, the one that shows the stage; what it then is.
        ends: reasons that its reader may hear, one a completion, where the abort came from elsewhere.
    """

    prompt: list[int]
    fields: dict[str, Any] = field(default_factory=dict)
    num_neighbours: int = 1
    num_steps: int = 0
    count: tuple[str, int] = ("num_running", 2)
    ends: tuple[str, ...] = ("abort",)


STAGES = {
    "queued": Stage(SHORT_PROMPT, num_neighbours=MAX_ROWS, num_steps=1, count=("num_waiting", 1)),
    "in its prompt": Stage(LONG_PROMPT),
    "between chunks of its prompt": Stage(LONG_PROMPT, num_steps=2),
    "decoding": Stage(SHORT_PROMPT, num_steps=5),
    "several completions": Stage(
        SHORT_PROMPT, {"n": 2, "temperature": 1.0}, num_steps=5, count=("num_running", 3)
    ),
    "waiting for a mask": Stage(
        SHORT_PROMPT,
        {"structured_outputs": {"regex": "a"}, "ignore_eos": False},
        num_steps=2,
        count=("num_held", 1),
    ),
    "at its last token": Stage(SHORT_PROMPT, {"max_tokens": 3}, num_steps=2, ends=("abort", "length")),
}
HTTP_STAGES = [
    name for name in STAGES if name != "waiting for a mask"
]  # forms of any text need a real compiler


def request(name: str, prompt: list[int], **fields: Any) -> EngineRequest:
    params = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, "detokenize": False, **fields}
    return EngineRequest(name, prompt, SamplingParams(**params))


def neighbour_prompt(index: int) -> list[int]:
    return [11 + index, 12, 13 + index]


async def read(engine: SmallEngine, asked: EngineRequest) -> list[EngineOutput]:
    return [output async for output in engine.stream(asked)]


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_true():
            await asyncio.sleep(0.0002)


def is_at_gate(engine: SmallEngine) -> bool:
    """All that may be launched is, and the oldest of it is not let through."""
    return engine.runner.gate.num_waiting > 0


async def let(engine: SmallEngine, num_steps: int) -> None:
    """That many steps, and until the next one stands at the gate."""
    begin = engine.runner.num_steps
    engine.runner.gate.let(num_steps)
    await until(lambda: engine.runner.num_steps == begin + num_steps and is_at_gate(engine))


async def bring_neighbours(
    engine: SmallEngine, num_neighbours: int
) -> list[asyncio.Task[list[EngineOutput]]]:
    engine.runner.gate.close()
    tasks = [
        asyncio.ensure_future(
            read(engine, request(f"neighbour {i}", neighbour_prompt(i), max_tokens=NEIGHBOUR_TOKENS))
        )
        for i in range(num_neighbours)
    ]
    await until(lambda: is_at_gate(engine))
    while engine.ledger.stats().num_running < num_neighbours:
        await let(engine, 1)
    return tasks


async def give_up(engine: SmallEngine, stage: Stage, name: str, *, by_id: bool) -> None:
    """One round: a victim is brought to its stage with the device standing still, then left, or aborted by its id."""
    neighbours = await bring_neighbours(engine, stage.num_neighbours)
    asked = request(name, stage.prompt, **stage.fields)
    reader = asyncio.ensure_future(read(engine, asked))
    await until(lambda: name in engine._desk._tickets)  # a grammar is compiled on a thread first
    await let(engine, 1 + stage.num_steps)  # what stood at the gate has no place for it
    assert getattr(engine.ledger.stats(), stage.count[0]) == stage.count[1]
    if by_id:
        assert await engine.abort(name)
    else:
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader
    await let(engine, 2)
    stats = engine.ledger.stats()
    assert (stats.num_running, stats.num_waiting) == (stage.num_neighbours, 0), "it is there after two steps"
    if by_id:
        reasons = [output.finish_reason for output in await reader if output.finish_reason]
        assert len(reasons) == asked.params.n
        assert set(reasons) <= set(stage.ends)
    assert not await engine.abort(name)
    await end_round(engine, neighbours)


async def end_round(engine: SmallEngine, neighbours: list[asyncio.Task[list[EngineOutput]]]) -> None:
    engine.mask_gate.set()
    engine.runner.gate.open()
    for index, outputs in enumerate(await asyncio.gather(*neighbours)):
        tokens = [token for output in outputs for token in output.token_ids]
        assert tokens == expected_tokens(neighbour_prompt(index), NEIGHBOUR_TOKENS)
    await until(lambda: engine.ledger.num_in_flight == 0)
    engine.check_empty()
    engine.mask_gate.clear()


async def give_up_often(stage: Stage, count: int, launch_depth: int) -> None:
    async with SmallEngine(max_rows=MAX_ROWS, launch_depth=launch_depth) as engine:
        for index in range(count):
            await give_up(engine, stage, f"victim {index}", by_id=index % 2 == 1)


@pytest.mark.parametrize("launch_depth", [0, 1])
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("count", COUNTS)
def test_a_request_can_be_given_up_anywhere(name: str, count: int, launch_depth: int) -> None:
    asyncio.run(give_up_often(STAGES[name], count, launch_depth))
    if count == 500:
        record(f"H7 aborts, {name}, launch depth {launch_depth}", num_aborts=count)


def test_who_would_stay_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check's own check: a desk that forgets to tell the engine."""
    monkeypatch.setattr(RequestDesk, "_end", lambda self, ticket: None)
    for name in ("queued", "decoding"):
        with pytest.raises((AssertionError, TimeoutError)):
            asyncio.run(give_up_often(STAGES[name], 1, 0))


@contextlib.contextmanager
def serving(launch_depth: int = 0) -> Iterator[tuple[Live, SmallEngine]]:
    engine = SmallEngine(max_rows=MAX_ROWS, launch_depth=launch_depth)
    with live(engine) as server:
        yield server, engine


def let_now(engine: SmallEngine, num_steps: int) -> None:
    """`let`, for who is not on the loop."""
    begin = engine.runner.num_steps
    engine.runner.gate.let(num_steps)
    wait_until(lambda: engine.runner.num_steps == begin + num_steps and is_at_gate(engine))


def body_of(prompt: list[int], **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0, "max_tokens": 40, "ignore_eos": True, **fields}


def disconnect(server: Live, engine: SmallEngine, stage: Stage, *, is_stream: bool) -> None:
    """A round as above, over sockets: the victim's client goes away."""
    engine.runner.gate.close()
    num_neighbours = stage.num_neighbours
    with contextlib.ExitStack() as stack:
        neighbours = [stack.enter_context(server.connect()) for _ in range(num_neighbours)]
        for index, sock in enumerate(neighbours):
            fields = {"max_tokens": NEIGHBOUR_TOKENS, "return_token_ids": True}
            sock.sendall(posted(body_of(neighbour_prompt(index), **fields)))
        wait_until(lambda: is_at_gate(engine) and len(server.state.open_calls) == num_neighbours)
        while engine.ledger.stats().num_running < num_neighbours:
            let_now(engine, 1)
        with server.connect() as victim:
            victim.sendall(posted(body_of(stage.prompt, stream=is_stream, **stage.fields)))
            wait_until(lambda: len(engine._desk._tickets) == num_neighbours + 1)
            let_now(engine, 1 + stage.num_steps)
            assert getattr(engine.ledger.stats(), stage.count[0]) == stage.count[1]
            if is_stream and stage.num_steps == 5:
                assert victim.recv(100)
        wait_until(lambda: len(server.state.open_calls) == num_neighbours)
        let_now(engine, 2)
        stats = engine.ledger.stats()
        assert (stats.num_running, stats.num_waiting) == (num_neighbours, 0), "it is there after two steps"
        engine.runner.gate.open()
        for index, sock in enumerate(neighbours):
            check_neighbour(index, read_all(sock))
    wait_until(lambda: not server.state.open_calls and engine.ledger.num_in_flight == 0)
    engine.check_empty()


def check_neighbour(index: int, reply: bytes) -> None:
    (choice,) = json.loads(reply.split(b"\r\n\r\n", 1)[1])["choices"]
    assert choice["token_ids"] == expected_tokens(neighbour_prompt(index), NEIGHBOUR_TOKENS)


@pytest.mark.parametrize("name", HTTP_STAGES)
@pytest.mark.parametrize("count", [4, pytest.param(500, marks=pytest.mark.long)])
def test_a_client_can_go_anywhere(name: str, count: int) -> None:
    with serving() as (server, engine):
        num_before = num_open_files()
        for index in range(count):
            disconnect(server, engine, STAGES[name], is_stream=index % 2 == 0)
        wait_until(lambda: num_open_files() <= num_before + 2)
        assert server.state.gate.num_requests == server.state.gate.num_queued_tokens == 0
    if count == 500:
        record(f"H7 disconnects, {name}", num_disconnects=count)


def test_a_client_whose_leaving_goes_unnoticed_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headway.server.state.OpenCall.leave", lambda call: None)
    monkeypatch.setattr("tests.server.live.WAIT_S", 1.0)
    with serving() as (server, engine):
        with pytest.raises(AssertionError, match="never came true"):
            disconnect(server, engine, STAGES["decoding"], is_stream=False)
        engine.runner.gate.open()
