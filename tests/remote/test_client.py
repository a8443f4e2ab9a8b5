"""`RemoteEngine` on a process whose engine says letters: what readers get, how slow they may be, how it starts."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from headway.errors import (
    ConfigError,
    EngineDeadError,
    HeadwayError,
    MemoryBudgetError,
    ModelLoadError,
    OverloadedError,
    RequestError,
)
from headway.remote import messages
from headway.remote.client import RemoteEngine
from headway.request import SamplingParams
from headway.server.client import EngineClient, EngineOutput, EngineRequest
from tests.remote.hosted import LETTERS, letter_ids
from tests.remote.serving import HOSTED

Body = Callable[[], Awaitable[None]]


@asynccontextmanager
async def remote(**options: Any) -> AsyncIterator[RemoteEngine]:
    engine = RemoteEngine(command=HOSTED, **options)
    try:
        yield engine
    finally:
        await engine.close()


def run(test: Body) -> Callable[[], None]:
    @wraps(test)
    def inner() -> None:
        asyncio.run(asyncio.wait_for(test(), 60))

    return inner


def request(name: str = "a", max_tokens: int = 5, **fields: Any) -> EngineRequest:
    return EngineRequest(name, [1, 2, 3], SamplingParams(max_tokens=max_tokens), **fields)


async def read(engine: EngineClient, asked: EngineRequest) -> list[EngineOutput]:
    return [output async for output in engine.stream(asked)]


async def until(is_true: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(2000):
        if await is_true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


def test_it_is_an_engine_client() -> None:
    client: type[EngineClient] = RemoteEngine
    assert client is RemoteEngine


@run
async def test_outputs_joined_are_the_request() -> None:
    async with remote(step_s=0.002) as engine:
        found = await asyncio.gather(*(read(engine, request(str(i), 5 + i)) for i in range(20)))
        token_ids = letter_ids(engine.tokenizer)
        for i, outputs in enumerate(found):
            assert "".join(output.text for output in outputs) == LETTERS[: 5 + i]
            assert [token for output in outputs for token in output.token_ids] == token_ids[: 5 + i]
            assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
            assert outputs[-1].finish_reason == "length"
            assert outputs[-1].usage.num_output_tokens == 5 + i
            assert outputs[-1].metrics is not None
        stats = await engine.stats()
        assert (stats.num_finished_total, stats.num_running) == (20, 0)
        assert (await engine.recent_steps())[0].step == stats.steps_committed
        assert await engine.reset_prefix_cache()
        assert await engine.stop_profile() == "{}"
        with pytest.raises(RequestError, match="profile must be possible"):
            await engine.start_profile()


@run
async def test_errors_of_one_request_are_its_own() -> None:
    async with remote(step_s=0.002, max_waiting=2) as engine:
        neighbour = asyncio.ensure_future(read(engine, request("n", 200)))
        with pytest.raises(RequestError) as caught:
            await read(engine, request("x", cache_salt="cancel"))
        assert str(caught.value) == "cache_salt must be something else, got 'cancel'"
        assert caught.value.parameter == "cache_salt"
        params = SamplingParams(structured_outputs={"regex": "a"})
        with pytest.raises(RequestError, match="structured_outputs must be unset here"):
            await read(engine, EngineRequest("g", [1], params))
        with pytest.raises(RequestError, match="request_id"):
            await read(engine, request("n"))
        second = asyncio.ensure_future(read(engine, request("s", 200)))
        await until(lambda: _num_running(engine, 2))
        with pytest.raises(OverloadedError) as full:
            await read(engine, request("t"))
        assert full.value.retry_after_s == 3
        assert len("".join(output.text for output in await neighbour)) == 200
        await second


async def _num_running(engine: RemoteEngine, num: int) -> bool:
    return (await engine.stats()).num_running == num


@run
async def test_what_is_too_large_for_a_frame_is_refused() -> None:
    async with remote() as engine:
        num = messages.MAX_SERVER_FRAME_BYTES // 5 + 1
        asked = EngineRequest("big", [2**31 - 1] * num, SamplingParams())
        small = asyncio.ensure_future(read(engine, request("small")))
        with pytest.raises(RequestError, match=f"prompt must be of at most .*{num} token ids"):
            await read(engine, asked)
        assert len(await small) >= 1


@run
async def test_who_leaves_ends_the_request_and_abort_gives_what_there_is() -> None:
    async with remote(step_s=0.005) as engine:
        async for _ in engine.stream(request("left", 4000)):
            break
        await until(lambda: _num_running(engine, 0))
        task = asyncio.ensure_future(read(engine, request("aborted", 4000)))
        await until(lambda: _num_running(engine, 1))
        assert await engine.abort("aborted")
        assert (await task)[-1].finish_reason == "abort"
        assert not await engine.abort("aborted")
        assert not await engine.abort("never there")


@run
async def test_a_slow_reader_gets_fewer_and_larger_outputs_and_holds_nobody_up() -> None:
    async with remote(step_s=0.001) as engine:
        slow = engine.stream(request("slow", 300))
        first = await anext(slow)
        quick = await read(engine, request("quick", 400))
        rest = [output async for output in slow]
        assert len(rest) < len(quick) / 4
        assert len(first.text + "".join(output.text for output in rest)) == 300


@run
async def test_a_server_that_reads_nothing_does_not_stop_the_engine() -> None:
    """Its loop stands still for a second: the engine goes on, and what it made comes in a few large outputs."""
    async with remote(step_s=0.001) as engine:
        slow = engine.stream(request("slow", 3000))
        await anext(slow)
        before = (await engine.stats()).steps_committed
        time.sleep(1.0)
        assert (await engine.stats()).steps_committed > before + 50
        outputs = [await anext(slow) for _ in range(3)]
        assert max(len(output.text) for output in outputs) > 50
        await slow.aclose()  # type: ignore[attr-defined]


@run
async def test_draining_and_closing() -> None:
    async with remote(step_s=0.002) as engine:
        task = asyncio.ensure_future(read(engine, request("a", 100)))
        await until(lambda: _num_running(engine, 1))
        await engine.drain()
        assert task.done() or (await task)[-1].finish_reason == "length"
        assert not (await engine.health()).is_ready
        with pytest.raises(OverloadedError):
            await read(engine, request("b"))
    await engine.close()
    assert not _is_running(engine.pid)
    with pytest.raises(EngineDeadError):
        await read(engine, request("c"))


@run
async def test_closing_answers_who_waits() -> None:
    async with remote(step_s=0.01) as engine:
        task = asyncio.ensure_future(read(engine, request("a", 4000)))
        await until(lambda: _num_running(engine, 1))
    with pytest.raises(EngineDeadError):
        await task


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ConfigError, ModelLoadError, MemoryBudgetError])
def test_what_keeps_an_engine_from_starting_reaches_the_caller(kind: type[HeadwayError]) -> None:
    with pytest.raises(kind) as caught:
        RemoteEngine(command=HOSTED, fails_with=kind.__name__)
    assert str(caught.value) == "it cannot start (change something)"
    assert caught.value.hint == "change something"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fails_with": "exit"}, "exit code 7 before it was ready"),
        ({"fails_with": "bug"}, "TypeError: that was not expected"),
        ({"command": ("false",)}, "exit code 1 before it was ready"),
    ],
)
def test_a_process_that_ends_says_how(options: dict[str, Any], text: str) -> None:
    with pytest.raises(HeadwayError, match=text):
        RemoteEngine(**{"command": HOSTED, **options})


def test_progress_is_passed_on_and_nothing_is_left(short_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def progress(num_done: int, num_total: int) -> None:
        seen.append((num_done, num_total))

    async def body() -> None:
        async with remote(progress=progress, has_tokenizer=False) as engine:
            assert engine.tokenizer is None
            assert not list(short_path.iterdir())  # the socket is gone once it is in use
            assert len(await read(engine, request())) >= 1

    asyncio.run(body())
    assert seen == [(0, 2), (2, 2)]


def test_a_temporary_directory_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose name is too long for a socket is passed over."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))
    with pytest.raises(HeadwayError, match="exit code 1"):
        RemoteEngine(command=("false",))
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(ConfigError, match="TMPDIR"):
        RemoteEngine(command=("false",))


def test_a_module_in_the_working_directory_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint's folder is a usual place to serve from."""
    for name in ("msgspec", "headway", "zmq", "torch"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match="nowhere"):
        RemoteEngine("nowhere", device="cpu")
    assert not (tmp_path / "ran").exists()
