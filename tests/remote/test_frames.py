"""What is no message is refused whole: by the decoders, at the door of a server, by both ends in service."""

from __future__ import annotations

import asyncio
import os
import random
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from headway.errors import ConfigError, EngineDeadError, RequestError
from headway.outputs import Logprob, RequestMetrics
from headway.remote.child import EXIT_ORPHANED
from headway.remote.host import MAX_UNSEEN_FRAMES
from headway.remote.link import Link
from headway.remote.messages import (
    MAX_ENGINE_FRAME_BYTES,
    PROTOCOL_VERSION,
    Abort,
    Add,
    Ask,
    EngineMessage,
    Failed,
    Fault,
    Hello,
    Leave,
    Loading,
    Output,
    ProtocolError,
    Ready,
    Seen,
    ServerMessage,
    Start,
    engine_messages,
    server_messages,
    to_frames,
)
from headway.remote.process import EngineProcess
from headway.remote.records import joined, to_add, to_engine_output, to_output, to_request
from headway.request import SamplingParams
from headway.server.client import EngineOutput, EngineRequest, Usage
from tests.remote.serving import HOSTED
from tests.remote.test_client import read, remote, request, run

RICH = SamplingParams(
    temperature=0.5, seed=2**64 - 1, stop=["x", "yy"], logit_bias={5: -1.5}, bad_words=["a", [1, 2]], n=3,
    structured_outputs={"json": {"type": "object", "properties": {"a": {"enum": [1, None, 2.5]}}}},
    max_tokens=None,
)  # fmt: skip
FULL = EngineOutput(
    "r", 1, "äb\0", [1, 2], Usage(3, 2, 1), [{1: Logprob(-0.5, 1, "ä")}, {2: Logprob(-1.0, None)}],
    "stop", 7, [None, {4: Logprob(-2.0, 3)}], RequestMetrics(1.0, 2.0, None, 3, 2),
)  # fmt: skip
SERVER_MESSAGES: list[ServerMessage] = [
    to_add(1, EngineRequest("r", [1, 2**31 - 1], RICH, None, -5, "salt")), Leave(1), Abort(2), Ask(3, "stats"), Seen(4),
]  # fmt: skip
ENGINE_MESSAGES: list[EngineMessage] = [Hello(1, "s"), to_output(9, FULL)]


def frame_of(messages: list[Any]) -> bytes:
    frames, too_large = to_frames(messages, 1 << 20)
    assert len(frames) == 1
    assert not too_large
    return frames[0]


def test_records_come_through_as_they_were() -> None:
    assert server_messages(frame_of(SERVER_MESSAGES)) == SERVER_MESSAGES
    assert engine_messages(frame_of(ENGINE_MESSAGES)) == ENGINE_MESSAGES
    add = server_messages(frame_of(SERVER_MESSAGES))[0]
    assert isinstance(add, Add)
    found = to_request(add)
    assert found == EngineRequest("r", [1, 2**31 - 1], found.params, None, -5, "salt")
    for name in SamplingParams.__dataclass_fields__:
        value, expected = getattr(found.params, name), getattr(RICH, name)
        assert value == (list(expected) if isinstance(expected, tuple) else expected), name
    output = engine_messages(frame_of(ENGINE_MESSAGES))[1]
    assert isinstance(output, Output)
    assert to_engine_output("r", output) == FULL


def test_outputs_that_follow_each_other_are_joined() -> None:
    first = to_output(9, EngineOutput("r", 1, "a", [5], Usage(3, 1, 1), [{5: Logprob(-0.1, 1)}]))
    both = to_engine_output("r", joined([first, to_output(9, FULL)]))
    assert (both.text, both.token_ids, both.finish_reason) == ("aäb\0", [5, 1, 2], "stop")
    assert both.logprobs is not None
    assert [*both.logprobs[0], *both.logprobs[1], *both.logprobs[2]] == [5, 1, 2]
    assert both.prompt_logprobs == FULL.prompt_logprobs
    assert both.metrics == FULL.metrics


@pytest.mark.parametrize(
    "frame",
    [
        b"", b"\xc1", b"\x00", b"\x80", b"null", b"\x91\x91\xa5Alien", b"\x91\x92\xa5Leave\xa11",
        b"\x91\x93\xa5Leave\x01\x02", b"\x91\x91\xa5Leave", b"\xdd\xff\xff\xff\xff", b"\xc6\x7f\xff\xff\xff",
        b"\x91" * 100_000, b"\x91\x92\xa5Leave\xcf" + b"\xff" * 8 + b"\xa1",
        msgspec.msgpack.encode([["Ask", 1, "rm -rf"]]), msgspec.msgpack.encode([["Hello", 1, "s"]]),
        msgspec.msgpack.encode([["Add", 1, "r", [1.5], {}, 0, None]]),
        msgspec.msgpack.encode([["Add", 1, "r", [1], {}, 0, None, "more"]]),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"a frame of {len(frame)} bytes is no message"):
        server_messages(frame)


@pytest.mark.parametrize("count", [2_000, pytest.param(500_000, marks=pytest.mark.long)])
def test_damaged_frames_are_refused_or_are_messages(count: int) -> None:
    """Any other exception would end the engine's process."""
    rng = random.Random(5)
    frames = [frame_of(SERVER_MESSAGES), frame_of(ENGINE_MESSAGES)]
    num_refused = 0
    for _ in range(count):
        data = bytearray(rng.choice(frames))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data) + 1)
            match rng.randrange(4):
                case 0:
                    data[place : place + 1] = rng.randbytes(1)
                case 1:
                    del data[place : place + rng.randint(1, 9)]
                case 2:
                    data[place:place] = rng.choice(
                        [b"\x91" * 3000, b"\xdf\xff\xff\xff\xff", rng.randbytes(8)]
                    )
                case _:
                    data = data[:place]
        for decode in (engine_messages, server_messages):
            try:
                for message in decode(bytes(data)):
                    if isinstance(message, Add):
                        to_request(message)
            except (ProtocolError, RequestError):
                num_refused += 1
    assert count < num_refused < 2 * count  # most are, and some still are messages


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"temperature": "hot"}, ProtocolError),
        ({"__class__": "x"}, ProtocolError),
        ({"n": 1, "best_of": 2}, ProtocolError),
        ({"temperature": -1.0}, RequestError),
        ({"structured_outputs": {"regex": "("}}, None),
    ],
)
def test_parameters_are_checked_again(params: dict[str, Any], error: type[Exception] | None) -> None:
    add = Add(1, "r", [1], msgspec.Raw(msgspec.msgpack.encode(params)), 0, None, True)
    if error is None:
        to_request(add)
        return
    with pytest.raises(error):
        to_request(add)


def test_messages_are_divided_among_frames() -> None:
    messages = [Output(i, 0, "x" * 100, [], 1, 1, 0) for i in range(50)]
    huge = Output(50, 0, "x" * 2000, [], 1, 1, 0)
    frames, too_large = to_frames([*messages, huge], 1000)
    assert too_large == [huge]
    assert len(frames) > 5
    assert all(len(frame) <= 1000 for frame in frames)
    assert [message for frame in frames for message in engine_messages(frame)] == messages


# --- at the door ------------------------------------------------------------------------------------------------------


def test_strangers_at_the_door_are_not_heard(short_path: Path) -> None:
    """They knock while the engine starts. The engine's own words count, and the door is closed behind it."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    process = EngineProcess({}, watchdog_timeout_s=60, command=("sleep", "60"))
    try:
        folder = next(short_path.iterdir())
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "engine").stat().st_mode) == 0o600

        def caller() -> zmq.Socket[bytes]:
            socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
            socket.connect(f"ipc://{folder}/engine")
            return socket

        guess = frame_of(
            [Hello(PROTOCOL_VERSION, "guess"), Failed(Fault("HeadwayError", "not from the engine"))]
        )
        frames = [b"", b"\xc1", guess, guess[:3], b"\x91" * 5000]
        strangers = [caller() for _ in frames]
        for stranger, frame in zip(strangers, frames, strict=True):
            stranger.send(frame)
        known = caller()
        known.send(frame_of([Hello(PROTOCOL_VERSION, process._secret)]))
        known.send(frame_of([Loading(0, 1)]))

        def progress(num_done: int, num_total: int) -> None:
            time.sleep(0.01)
            is_last = process.link.num_strangers == len(frames)
            known.send(frame_of([Failed(Fault("ConfigError", "enough"))] if is_last else [Loading(0, 1)]))

        with pytest.raises(ConfigError, match="enough"):
            process.greet(progress)
        assert process.link.num_strangers == len(frames)
        assert not folder.exists()
    finally:
        process.end()
        context.destroy(linger=0)


def test_another_version_is_refused() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    process = EngineProcess({}, watchdog_timeout_s=60, command=("sleep", "60"))
    known = context.socket(zmq.DEALER)
    known.connect(process._address)
    known.send(frame_of([Hello(PROTOCOL_VERSION + 1, process._secret)]))
    with pytest.raises(EngineDeadError, match=f"version {PROTOCOL_VERSION + 1}"):
        process.greet()
    context.destroy(linger=0)


def test_a_frame_above_the_cap_is_never_read(short_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = f"ipc://{short_path}/s"
    link = Link.bound(context, address, max_frame_bytes=1000)
    large, small = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    for socket, size in ((large, 1001), (small, 1000)):
        socket.connect(address)
        socket.send(b"x" * size)
    assert link.wait(10)
    assert [len(found[1]) for _ in range(2) if (found := link.receive())] == [1000]
    assert not link.wait(0.3)
    context.destroy(linger=0)


# --- in service -------------------------------------------------------------------------------------------------------


@run
async def test_an_engine_that_talks_nonsense_is_ended() -> None:
    async with remote(step_s=0.01, max_steps=5, stall="nonsense") as engine:
        with pytest.raises(EngineDeadError, match="what is no message"):
            await read(engine, request("a", 100))
        assert not (await engine.health()).is_alive


@pytest.mark.parametrize("frame", [b"\xc1", frame_of(ENGINE_MESSAGES), b""])
def test_a_server_that_talks_nonsense_ends_the_engine(frame: bytes) -> None:
    async def body() -> None:
        async with remote(step_s=0.01) as engine:
            task = asyncio.ensure_future(read(engine, request("a", 4000)))
            await asyncio.sleep(0.05)
            engine._process.link.send(frame)
            with pytest.raises(EngineDeadError, match="is no message"):
                await task

    asyncio.run(asyncio.wait_for(body(), 60))


def test_an_engine_holds_back_what_its_server_has_not_seen(short_path: Path) -> None:
    """A server that never says what it has seen gets a handful of frames, and all the rest in one after it has."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = Link.bound(context, address := f"ipc://{short_path}/s", MAX_ENGINE_FRAME_BYTES)
    start = Start(PROTOCOL_VERSION, address, "s", os.getpid(), False, 60.0, 30, {"step_s": 0.001})
    process = subprocess.Popen(HOSTED, stdin=subprocess.PIPE)
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(start) + b"\n")
        process.stdin.flush()
        while True:
            assert link.wait(30)
            found = link.receive()
            assert found is not None
            if isinstance(engine_messages(found[1])[0], Ready):
                break
        link.peer = found[0]
        link.send(frame_of([to_add(1, EngineRequest("r", [1], SamplingParams(max_tokens=2000)))]))
        outputs = _outputs_until_quiet(link)
        assert 1 <= len(outputs) <= MAX_UNSEEN_FRAMES
        link.send(frame_of([Seen(100)]))
        rest = _outputs_until_quiet(link)
        assert max(len(output.text) for output in rest) > 100
        text = "".join(output.text for output in outputs + rest)
        assert text == ("abcdefghijklmnopqrstuvwxyz" * 80)[: len(text)]
    finally:
        process.stdin.close()
        assert process.wait(30) == EXIT_ORPHANED
        context.destroy(linger=0)


def _outputs_until_quiet(link: Link) -> list[Output]:
    """Beats come four times a second at most; outputs, as long as they may, every millisecond."""
    outputs: list[Output] = []
    num_quiet = 0
    while num_quiet < 3 and len(outputs) < 1000:
        frame = link.receive() if link.wait(0.5) else None
        new = [m for m in engine_messages(frame[1]) if isinstance(m, Output)] if frame else []
        num_quiet = 0 if new else num_quiet + 1
        outputs += new
    return outputs
