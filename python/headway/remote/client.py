"""`RemoteEngine`: an engine in a process of its own, as the server's event loop sees it.

Nothing here waits for a reader: what comes for a request is kept with it, and who reads it takes what has come since.
Nothing here waits for the engine but who asked it something: health is what it said last and how long ago that was.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeVar

import tokenizers

from headway.errors import EngineDeadError, OverloadedError, RequestError
from headway.outputs import StepSpan
from headway.remote.conversation import Conversation
from headway.remote.faults import from_fault
from headway.remote.messages import (
    MAX_SERVER_FRAME_BYTES,
    Abort,
    Add,
    Answer,
    Ask,
    Beat,
    Close,
    EngineMessage,
    Failed,
    FaultAnswer,
    FlagAnswer,
    Grown,
    Leave,
    Output,
    ProtocolError,
    Question,
    Ready,
    Refused,
    ServerMessage,
    StatsAnswer,
    StepsAnswer,
    TextAnswer,
)
from headway.remote.output_text import OutputText
from headway.remote.process import COMMAND, EngineProcess, Progress
from headway.remote.reading import Reading
from headway.remote.records import to_add
from headway.server.client import EngineOutput, EngineRequest, EngineStats, Health, ModelInfo
from headway.text import ChatTemplate, Tokenizer

logger = logging.getLogger("headway")
A = TypeVar("A", bound=Answer)

WATCH_S = 0.1
SILENCE_S = 2.0  # from here on the engine counts as not ready
CLOSE_S = 2.0  # for the engine to end by itself
FRESH_S = 1.0  # for fresh counters; then those of the last beat do


class RemoteEngine:
    """Starts an engine's process and waits until it takes requests. Satisfies `headway.server.client.EngineClient`.

    Args:
        model: checkpoint folder; None runs the model that is installed with Headway.
        progress: called with (bytes done, bytes in all) while weights load.
        max_waiting: completions that may wait beyond those that can run.
        watchdog_timeout_s: without a step while requests run, after which the engine ends itself.
        heartbeat_timeout_s: without a sign of life, after which the process is killed. Counted while the event loop
            runs, so that a machine that stood still as a whole blames nobody.
        command: see `EngineProcess`.
        **settings: fields of `EngineConfig`.

    Raises what `AsyncLLM` raises.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        progress: Progress | None = None,
        max_waiting: int | None = None,
        watchdog_timeout_s: float = 120.0,
        heartbeat_timeout_s: float = 5.0,
        command: Sequence[str] = COMMAND,
        **settings: Any,
    ) -> None:
        path = os.fspath(model) if isinstance(model, os.PathLike) else model
        options = {"model": path, "max_waiting": max_waiting, **settings}
        self._process = EngineProcess(options, watchdog_timeout_s=watchdog_timeout_s, command=command)
        ready = self._process.greet(progress)
        logger.info("the engine runs in process %d", self._process.pid)
        self._describe(ready)
        self._max_silent_turns = heartbeat_timeout_s / WATCH_S
        self._num_silent_turns = 0
        self._health = Health(True, True, "", 0.0)
        self._stats: EngineStats | None = None
        self._closing = ""
        self._death: EngineDeadError | None = None
        self._numbers = itertools.count(1)
        self._calls = itertools.count(1)
        self._readings: dict[int, Reading] = {}
        self._reading_by_id: dict[str, Reading] = {}
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._talk = Conversation(self._process.link, self._on_message, self._on_nonsense, self._on_too_large)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def _describe(self, ready: Ready) -> None:
        self.info: ModelInfo = ready.info
        self.tokenizer: Tokenizer | None = None
        self.chat_template: ChatTemplate | None = None
        if ready.tokenizer_json is not None:
            backend = tokenizers.Tokenizer.from_str(ready.tokenizer_json)
            self.tokenizer = Tokenizer(backend, ready.special_tokens)
        if ready.template is not None:
            self.chat_template = ChatTemplate(ready.template, ready.template_tokens)

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._process.pid

    # --- requests -------------------------------------------------------------------------------------------------

    async def stream(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """See `EngineClient.stream`."""
        reading = self._open(request)
        try:
            while not reading.is_over:
                for output in await reading.take():
                    yield output
        finally:
            self._leave(reading)

    async def abort(self, request_id: str) -> bool:
        """See `EngineClient.abort`."""
        self._refuse_if_dead()
        reading = self._reading_by_id.get(request_id)
        if reading is None or reading.has_ended:
            return False
        self._talk.say(Abort(reading.number))
        return True

    def _open(self, request: EngineRequest) -> Reading:
        self._attach()
        self._refuse_if_dead()
        if self._closing:
            raise OverloadedError(self._closing, retry_after_s=1.0)
        if request.request_id in self._reading_by_id:
            raise RequestError(
                "request_id", request.request_id, "unique among the requests that are not over"
            )
        reading = Reading(next(self._numbers), request, OutputText.of(self.tokenizer, request))
        self._talk.say(to_add(reading.number, request, has_text=reading.text is None))
        self._readings[reading.number] = self._reading_by_id[request.request_id] = reading
        self._is_empty.clear()
        return reading

    def _leave(self, reading: Reading) -> None:
        if self._readings.pop(reading.number, None) is None:
            return
        del self._reading_by_id[reading.request_id]
        if not self._readings:
            self._is_empty.set()
        if not reading.has_ended and self._death is None:
            self._talk.say(Leave(reading.number))

    # --- how it does ----------------------------------------------------------------------------------------------

    async def health(self) -> Health:
        self._attach()
        if self._death is not None:
            return Health(False, False, str(self._death), self._health.seconds_since_progress)
        silence_s = self._num_silent_turns * WATCH_S
        if silence_s > SILENCE_S:
            reason = f"the engine's process has given no sign of life for {silence_s:.0f} s"
            return Health(True, False, reason, self._health.seconds_since_progress + silence_s)
        if self._closing:
            return Health(True, False, self._closing, self._health.seconds_since_progress)
        return self._health

    async def stats(self) -> EngineStats:
        """Fresh ones, or those of the last sign of life where the engine does not answer."""
        try:
            answer = await asyncio.wait_for(self._ask("stats", StatsAnswer), FRESH_S)
            self._stats = answer.stats
        except (TimeoutError, EngineDeadError):
            if self._stats is None:
                raise EngineDeadError("the engine's process does not answer") from None
        return self._stats

    async def recent_steps(self) -> list[StepSpan]:
        try:
            return (await asyncio.wait_for(self._ask("recent_steps", StepsAnswer), FRESH_S)).steps
        except (TimeoutError, EngineDeadError):
            return []

    async def reset_prefix_cache(self) -> bool:
        return (await self._ask("reset_prefix_cache", FlagAnswer)).is_done

    async def start_profile(self) -> None:
        await self._ask("start_profile", TextAnswer)

    async def stop_profile(self) -> str:
        return (await self._ask("stop_profile", TextAnswer)).text

    async def _ask(self, question: Question, kind: type[A]) -> A:
        self._attach()
        self._refuse_if_dead()
        call = next(self._calls)
        self._answers[call] = future = asyncio.get_running_loop().create_future()
        self._talk.say(Ask(call, question))
        try:
            answer = await future
        finally:
            self._answers.pop(call, None)
        if isinstance(answer, FaultAnswer):
            raise from_fault(answer.fault)
        if not isinstance(answer, kind):
            raise ProtocolError(f"{question} was answered by {type(answer).__name__}")
        return answer

    # --- running it -----------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        self._closing = self._closing or "the engine is draining"
        await self._is_empty.wait()

    async def close(self) -> None:
        """Ends the process: by itself where it can, by force where not. Legal twice."""
        self._closing = "the engine is closed"
        if self._death is None:
            self._attach()
            self._talk.say(Close())
            self._talk.flush()
            deadline_s = asyncio.get_running_loop().time() + CLOSE_S
            while not self._process.why_ended() and asyncio.get_running_loop().time() < deadline_s:
                await asyncio.sleep(0.01)
        self._die(self._closing)
        await asyncio.to_thread(self._process.end)

    def _attach(self) -> None:
        """To the loop that runs, once: all calls come from one."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None:
            raise RuntimeError("a RemoteEngine serves one event loop")
        self._loop = loop
        if self._death is None:
            self._talk.attach(loop)
            self._watcher = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        """Until the end: notices that the process has gone or says nothing more."""
        while self._death is None:
            await asyncio.sleep(WATCH_S)
            self._num_silent_turns = 0 if self._talk.take_sign_of_life() else self._num_silent_turns + 1
            if reason := self._process.why_ended():
                self._talk.hear_all()  # its last words come first
                self._die(reason)
            elif self._num_silent_turns > self._max_silent_turns:
                silence_s = self._num_silent_turns * WATCH_S
                await asyncio.to_thread(self._process.dump_stacks)
                self._die(f"the engine's process gave no sign of life for {silence_s:.1f} s")

    def _die(self, reason: str) -> None:
        """Everybody who waits hears of it; nothing more is sent."""
        if self._death is not None:
            return
        self._death = EngineDeadError(reason)
        for reading in self._readings.values():
            reading.fail(EngineDeadError(reason))
        for future in self._answers.values():
            if not future.done():
                future.set_exception(EngineDeadError(reason))
        self._talk.end()
        if self._watcher is not None and self._watcher is not asyncio.current_task():
            self._watcher.cancel()
        self._process.kill()

    def _refuse_if_dead(self) -> None:
        if self._death is not None:
            raise EngineDeadError(str(self._death))

    def _on_message(self, message: EngineMessage) -> None:
        if isinstance(message, Grown):
            for growth in message.growths:
                if (reading := self._readings.get(growth.number)) is not None:
                    reading.grow(growth.token_ids)
        elif isinstance(message, Output):
            if (reading := self._readings.get(message.number)) is not None:
                reading.add(message)
        elif isinstance(message, Refused):
            if (reading := self._readings.get(message.number)) is not None:
                reading.fail(from_fault(message.fault))
        elif isinstance(message, Beat):
            self._stats, self._health = message.stats, message.health
        elif isinstance(message, Answer):
            if (future := self._answers.get(message.call)) is not None and not future.done():
                future.set_result(message)
        elif isinstance(message, Failed):
            self._die(str(from_fault(message.fault)))

    def _on_nonsense(self, error: ProtocolError) -> None:
        self._die(f"the engine's process sent what is no message: {error}")

    def _on_too_large(self, message: ServerMessage) -> None:
        if isinstance(message, Add) and (reading := self._readings.get(message.number)):
            limit = f"of at most {MAX_SERVER_FRAME_BYTES} bytes with its parameters"
            reading.fail(RequestError("prompt", f"{len(message.prompt_token_ids)} token ids", limit))
