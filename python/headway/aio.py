"""`AsyncLLM`: the engine for asyncio. One background thread steps it; any number of requests wait on one event loop.

Nothing is queued between the two: a completion keeps its tokens, and who reads it takes what has come since. A slow
reader so gets fewer and larger outputs, holds nobody up, and costs no memory beyond its own tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Self

from headway.config import EngineConfig
from headway.engine.assemble import Assembly, Progress, assemble
from headway.engine.desk import RequestDesk, Ticket
from headway.engine.perfetto import Recording, trace_json
from headway.engine.prompts import ChatRenderer, PromptReader
from headway.engine.trace import StepTrace
from headway.errors import RequestError
from headway.outputs import CompletionOutput, Delta, RequestOutput, StepSpan
from headway.request import Prompt, RequestOutputKind, SamplingParams, prompt_parts
from headway.server.client import (
    EngineOutput,
    EngineRequest,
    EngineStats,
    Health,
    ModelInfo,
    PrefixCacheStats,
    Usage,
)
from headway.text import ChatTemplate, Tokenizer

LONG_PROMPT_CHARS = 4096  # from here on tokenised on another thread: the event loop must not wait


class AsyncLLM(ChatRenderer):
    """A model ready to answer, from one event loop. Satisfies `headway.server.client.EngineClient`.

        async with AsyncLLM() as llm:
            async for output in llm.generate("def fib(n):", SamplingParams(max_tokens=32)):
                print(output.outputs[0].text)

    Args:
        model: checkpoint folder; None runs the model that is installed with Headway.
        progress: called with (bytes done, bytes in all) while weights load.
        max_waiting: completions that may wait beyond those that can run; further requests raise OverloadedError.
            None: no limit.
        **settings: fields of `EngineConfig`, listed in docs/settings.md.

    Raises what `LLM` raises. Weights are loaded here: where the loop must not wait, construct it on a thread.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        progress: Progress | None = None,
        max_waiting: int | None = None,
        **settings: Any,
    ) -> None:
        path = os.fspath(model) if isinstance(model, os.PathLike) else model
        self.config = EngineConfig(model=path, **settings)
        self._start(assemble(self.config, progress), max_waiting)
        self._parts.engine.prepare_grammars()

    def _start(self, parts: Assembly, max_waiting: int | None) -> None:
        self._parts = parts
        self._prompts = PromptReader(parts.tokenizer, parts.chat_template)
        self._numbers = itertools.count()
        max_open = None if max_waiting is None else parts.memory.max_rows + max_waiting
        self._desk = RequestDesk(parts.engine, max_open)
        self._trace: StepTrace | None = None
        self._finalizer = weakref.finalize(self, self._desk.stop)

    # --- requests -------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        use_prefix_cache: bool = True,
    ) -> AsyncIterator[RequestOutput]:
        """Yields the request as it grows, by `sampling_params.output_kind`: all so far, what is new, or the end alone.

        Prefixes are shared only between requests of an equal cache_salt, such as one customer's; without
        use_prefix_cache, nothing cached is read and nothing is left behind.
        Leaving early (break with aclose, cancellation) aborts it. Raises RequestError, CapacityError, OverloadedError
        or EngineDeadError.
        """
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        text, token_ids = await self._read(prompt)
        await self.prepare(params)
        request_id = request_id or f"request-{next(self._numbers)}"
        ticket = self._desk.open(request_id, text, token_ids, params, priority, cache_salt, use_prefix_cache)
        try:
            while not ticket.is_over:
                if deltas := await self._desk.next_deltas(ticket):
                    yield self._output(ticket, deltas)
        finally:
            self._desk.leave(ticket)

    async def stream(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """See `EngineClient.stream`. FINAL_ONLY gives each completion whole, any other kind what is new."""
        await self.prepare(request.params)
        ticket = self.open(request)
        try:
            while not ticket.is_over:
                for delta in await self._desk.next_deltas(ticket):
                    yield _engine_output(ticket, delta)
        finally:
            self._desk.leave(ticket)

    async def abort(self, request_id: str) -> bool:
        """Ends a request; its reader gets what there is, with finish_reason "abort"."""
        return self._desk.abort(request_id)

    # --- all requests at once, for who passes them on: `headway.remote.host.HostedEngine` ---------------------------

    def listen(self, on_news: Callable[[set[Ticket]], None]) -> None:
        """From now on tickets with news are told to `on_news`, on the loop; `stream` and `generate` wait in vain."""
        self._desk.on_news = on_news

    async def prepare(self, params: SamplingParams) -> None:
        """Compiles a grammar on another thread: the event loop must not wait."""
        if params.structured_outputs is not None:
            await asyncio.to_thread(self._parts.engine.prepare, params)

    def open(self, request: EngineRequest) -> Ticket:
        """Queues a request that was prepared. Whoever opens a ticket must leave it."""
        return self._desk.open(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            request.params,
            request.priority,
            request.cache_salt,
            request.use_prefix_cache,
        )

    def take(self, ticket: Ticket) -> list[EngineOutput]:
        """What has come since the last call. Raises the ticket's error once there is nothing before it."""
        return [_engine_output(ticket, delta) for delta in self._desk.take_deltas(ticket)]

    def take_tokens(self, ticket: Ticket) -> list[int]:
        """`take` for less, where a request without text merely goes on; else empty, and `take` must be asked."""
        return self._desk.take_tokens(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Ends what is not over. Legal twice."""
        self._desk.leave(ticket)

    # --- what it is and how it does -------------------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        parts = self._parts
        return ModelInfo(
            model=self.config.model or "headway-tiny",
            family=parts.model_config.family,
            device=str(parts.device),
            dtype=str(parts.dtype).removeprefix("torch."),
            vocab_size=parts.model_config.vocab_size,
            max_model_len=parts.memory.max_model_len,
            max_logprobs=self.config.max_logprobs,
            launch_depth=parts.launch_depth,
            eos_token_ids=self._parts.engine.limits.eos_token_ids,
            default_params=parts.defaults.params,
            settings=asdict(self.config),
        )

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._parts.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        return self._parts.chat_template

    def get_default_sampling_params(self) -> SamplingParams:
        return self._parts.defaults.params

    async def stats(self) -> EngineStats:
        ledger, meter = self._parts.engine.ledger.stats(), self._desk.meter
        cached = self._parts.engine.prefix_cache_stats()
        return EngineStats(
            num_waiting=ledger.num_waiting,
            num_running=ledger.num_running,
            num_paused=ledger.num_paused,
            blocks_total=ledger.blocks_total,
            blocks_free=ledger.blocks_free,
            blocks_fenced=ledger.blocks_fenced,
            slots_total=ledger.slots_total,
            slots_free=ledger.slots_free,
            slots_fenced=ledger.slots_fenced,
            steps_launched=ledger.steps_launched,
            steps_committed=ledger.steps_committed,
            num_evictions_total=ledger.num_evictions,
            num_finished_total=ledger.num_finished,
            num_prompt_tokens_total=meter.num_prompt_tokens,
            num_output_tokens_total=meter.num_output_tokens,
            device_busy_s=meter.busy_ns / 1e9,
            device_idle_s=meter.idle_ns / 1e9,
            seconds_since_progress=meter.seconds_since_progress,
            num_led_steps_total=meter.num_led,
            launch_lead_s=meter.lead_ns / 1e9,
            prefix_cache=PrefixCacheStats(
                **cached, snapshot_bytes=cached["num_snapshots"] * self._parts.memory.slot_bytes
            ),
        )

    async def recent_steps(self) -> list[StepSpan]:
        return self._desk.meter.recent_steps()

    async def health(self) -> Health:
        desk = self._desk
        reason = str(desk.death) if desk.death is not None else desk.closing
        return Health(desk.death is None, not reason, reason, desk.meter.seconds_since_progress)

    # --- running it -----------------------------------------------------------------------------------------------

    async def reset_prefix_cache(self) -> bool:
        """Forgets every cached prefix; running requests keep what they hold."""
        await self._desk.call(lambda engine: engine.ledger.reset_prefix_cache())
        return True

    async def start_profile(self) -> None:
        if self._trace is not None:
            raise RequestError("profile", "start", "started once before it is stopped")
        self._trace = trace = StepTrace()
        await self._desk.call(lambda engine: setattr(engine, "stages", trace.around(engine.stages)))

    async def stop_profile(self) -> str:
        trace, self._trace = self._trace, None
        if trace is None:
            raise RequestError("profile", "stop", "started before it is stopped")
        await self._desk.call(lambda engine: setattr(engine, "stages", self._desk.stages))
        timeline = trace.timeline()
        recordings = [Recording("headway", timeline)] if len(timeline) > 1 else []
        return trace_json(recordings, self.info.model)

    async def drain(self) -> None:
        await self._desk.drain()

    async def close(self) -> None:
        """Aborts what is left and frees the device's memory. Legal twice."""
        await self._desk.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _read(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        text, token_ids = prompt_parts(prompt)
        if token_ids is None and text is not None and len(text) >= LONG_PROMPT_CHARS:
            return await asyncio.to_thread(self._prompts.read, prompt)
        return self._prompts.read(prompt)

    def _output(self, ticket: Ticket, deltas: list[Delta]) -> RequestOutput:
        whole = self._desk.output(ticket)
        if ticket.params.output_kind != RequestOutputKind.DELTA:
            return whole
        return replace(whole, outputs=[_gained(delta) for delta in deltas])


def _gained(delta: Delta) -> CompletionOutput:
    return CompletionOutput(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=delta.logprobs,
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
    )


def _engine_output(ticket: Ticket, delta: Delta) -> EngineOutput:
    request = ticket.queued
    return EngineOutput(
        request_id=request.request_id,
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        usage=Usage(len(request.prompt_token_ids), request.num_output_tokens, request.num_cached_tokens or 0),
        logprobs=delta.logprobs,
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
        metrics=delta.metrics,
        prompt_logprobs=ticket.take_prompt_logprobs() if delta.index == 0 else None,
    )
