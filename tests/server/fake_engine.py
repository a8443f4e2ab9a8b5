"""An `EngineClient` without a model: says what it is told to say, as fast as it is told to, and counts who is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path

from headway.errors import EngineDeadError, OverloadedError, RequestError
from headway.outputs import Logprob, StepSpan
from headway.request import SamplingParams
from headway.server.client import EngineOutput, EngineRequest, EngineStats, Health, ModelInfo, Usage
from headway.text import ChatTemplate, Tokenizer

ASSETS = Path(__file__).parents[2] / "python" / "headway" / "assets" / "tiny"
VOCAB_SIZE = 2048
MAX_MODEL_LEN = 4096

Script = Callable[[EngineRequest], Sequence[str]]


def letters(request: EngineRequest) -> list[str]:
    """One letter a token, as many as asked for."""
    return [chr(ord("a") + i % 26) for i in range(request.params.max_tokens or 32)]


class FakeEngine:
    """Each request gets the pieces of `script`, one a step of `step_s`; `pieces_per_output` come together.

    `hold` makes all wait, before their first step or in the middle; `live` are the requests that are not over.
    """

    def __init__(
        self,
        script: Script = letters,
        *,
        step_s: float = 0.0,
        template: str | None = None,
        max_live: int | None = None,
    ) -> None:
        self.script = script
        self.step_s = step_s
        self.max_live = max_live
        self.live: dict[str, EngineRequest] = {}
        self.seen: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.num_left_early = 0
        self.may_go = asyncio.Event()
        self.may_go.set()
        self.num_steps_before_fault: int | None = None
        self.has_died = False
        self.is_closed = False
        self.is_recording = False
        self.stalled_s = 0.0
        self.tokenizer: Tokenizer | None = Tokenizer.from_dir(ASSETS)
        tokens = self.tokenizer.special_tokens
        found = ChatTemplate.find(ASSETS) if template is None else ChatTemplate(template, tokens)
        self.chat_template: ChatTemplate | None = found

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            model="fake",
            family="none",
            device="cpu",
            dtype="float32",
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_logprobs=20,
            launch_depth=0,
            eos_token_ids=(2,),
            default_params=SamplingParams(),
        )

    async def stream(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        if self.has_died:
            raise EngineDeadError("it has died")
        if self.max_live is not None and len(self.live) >= self.max_live:
            raise OverloadedError("too many", retry_after_s=3)
        if request.request_id in self.live:
            raise RequestError("request_id", request.request_id, "an id that is not in use")
        self.live[request.request_id] = request
        self.seen.append(request)
        is_over = False
        try:
            for index in range(request.params.n):
                async for output in self._completion(request, index):
                    is_over = output.finish_reason is not None and index == request.params.n - 1
                    yield output
        finally:
            self.num_left_early += not is_over
            self.live.pop(request.request_id, None)

    async def _completion(self, request: EngineRequest, index: int) -> AsyncIterator[EngineOutput]:
        pieces = list(self.script(request))
        for place, text in enumerate(pieces):
            if self.step_s or not self.may_go.is_set():
                await asyncio.sleep(self.step_s)
                await self.may_go.wait()
            if self.has_died or place == self.num_steps_before_fault:
                raise EngineDeadError("it has died")
            is_aborted = request.request_id in self.aborted
            is_last = place == len(pieces) - 1
            reason = "abort" if is_aborted else "stop" if is_last else None
            yield self._output(request, index, place, text, reason)
            if is_aborted:
                return

    @staticmethod
    def _output(
        request: EngineRequest, index: int, place: int, text: str, reason: str | None
    ) -> EngineOutput:
        wants = request.params.logprobs is not None
        return EngineOutput(
            request_id=request.request_id,
            index=index,
            text=text,
            token_ids=[10 + place],
            usage=Usage(len(request.prompt_token_ids), place + 1, 0),
            logprobs=[{10 + place: Logprob(-0.5, 1, text)}] if wants else None,
            finish_reason=reason,
        )

    async def abort(self, request_id: str) -> bool:
        self.aborted.append(request_id)
        return request_id in self.live

    async def stats(self) -> EngineStats:
        num = len(self.live)
        return EngineStats(0, num, 0, 8, 8, 0, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0)

    async def recent_steps(self) -> list[StepSpan]:
        return []

    async def health(self) -> Health:
        reason = "it has died" if self.has_died else ""
        return Health(not self.has_died, not self.has_died, reason, self.stalled_s)

    async def reset_prefix_cache(self) -> bool:
        return not self.live

    async def start_profile(self) -> None:
        if self.is_recording:
            raise RequestError("profile", "start", "stopped before it is started again")
        self.is_recording = True

    async def stop_profile(self) -> str:
        if not self.is_recording:
            raise RequestError("profile", "stop", "started before it is stopped")
        self.is_recording = False
        return '{"traceEvents": []}'

    async def drain(self) -> None: ...

    async def close(self) -> None:
        self.is_closed = True
