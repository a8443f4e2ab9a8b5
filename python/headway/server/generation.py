"""Prompts of one HTTP request in the engine: queued together, read as one stream, counted as one usage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NamedTuple

from headway.request import SamplingParams
from headway.server.calls import Call, Stream
from headway.server.client import EngineClient, EngineOutput, EngineRequest, Usage
from headway.server.errors import bad_request, failed_output, unavailable
from headway.server.schemas.common import (
    CompletionTokensDetails,
    PromptTokensDetails,
    SamplingFields,
    UsageInfo,
)
from headway.server.tracing import NoWatch, Watch


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt ready for the engine."""

    text: str | None
    token_ids: list[int]


class PromptOutput(NamedTuple):
    """What a completion of one of several prompts gained."""

    prompt_index: int
    output: EngineOutput


@dataclass(slots=True)
class UsageCount:
    """Usage of several prompts. `without_output` counts none: for answers whose only token is dropped."""

    without_output: bool = False
    num_reasoning_tokens: int = 0
    _by_prompt: dict[int, Usage] = field(default_factory=dict)

    def note(self, found: PromptOutput) -> None:
        self._by_prompt[found.prompt_index] = found.output.usage

    def info(self) -> UsageInfo:
        num_prompt = num_output = num_cached = 0
        for usage in self._by_prompt.values():
            num_prompt += usage.num_prompt_tokens
            num_output += usage.num_output_tokens
            num_cached += usage.num_cached_tokens
        if self.without_output:
            num_output = 0
        return UsageInfo(
            num_prompt,
            num_output,
            num_prompt + num_output,
            PromptTokensDetails(num_cached),
            CompletionTokensDetails(min(self.num_reasoning_tokens, num_output)),
        )


def engine_requests(
    call: Call, reply_id: str, fields: SamplingFields, prompts: Sequence[PromptTokens], params: SamplingParams
) -> list[EngineRequest]:
    """One a prompt. Raises ApiError for more completions than a request may have."""
    limit = call.state.settings.max_num_prompts
    if len(prompts) * params.n > limit:
        raise bad_request(
            "prompt", f"a request may have {limit} prompts times n, got {len(prompts) * params.n}"
        )
    salt = _salt(call, fields.cache_salt)
    number = next(call.state.request_numbers)  # callers may give one id to several requests, as retries do
    return [
        EngineRequest(
            request_id=f"{reply_id}-{number}-{index}",
            prompt_token_ids=prompt.token_ids,
            params=params,
            prompt=prompt.text,
            priority=fields.priority or 0,
            cache_salt=salt,
            use_prefix_cache=fields.use_prefix_cache is not False,
        )
        for index, prompt in enumerate(prompts)
    ]


def _salt(call: Call, asked: str | None) -> str | None:
    """One key's callers never learn by timing what another's have asked; what they add divides further."""
    parts = [part for part in (call.key_id, asked) if part]
    return "/".join(parts) if parts else None


async def run(call: Call, requests: Sequence[EngineRequest]) -> AsyncGenerator[PromptOutput, None]:
    """Outputs of all prompts as they come. Closing it aborts what is left.

    Raises what the engine raises; ApiError where a completion ended otherwise than by itself.
    """
    state = call.state
    state.check_accepting()
    num_tokens = sum(len(request.prompt_token_ids) for request in requests)
    with state.gate.admit(call.key_id, num_tokens) as admission:
        if call.open_call is not None:
            call.open_call.request_ids = [request.request_id for request in requests]
        with state.meter.watch(requests) as watch, spans_of(call, requests) as spans:

            def noted(prompt_index: int, output: EngineOutput) -> PromptOutput:
                admission.started()
                watch.note(prompt_index, output)
                spans.note(prompt_index, output)
                check_end(output, state.is_draining)
                return PromptOutput(prompt_index, output)

            if len(requests) == 1:
                async with aclosing(state.client.stream(requests[0])) as outputs:
                    async for output in outputs:
                        yield noted(0, output)
            else:
                async with aclosing(_race(state.client, requests)) as founds:
                    async for found in founds:
                        yield noted(found.prompt_index, found.output)


def spans_of(call: Call, requests: Sequence[EngineRequest]) -> Watch:
    tracing = call.state.tracing
    if tracing is None:
        return NoWatch()
    return tracing.watch(call.scope["path"], call.scope["headway.headers"], requests)


def check_end(output: EngineOutput, is_draining: bool) -> None:
    """Raises ApiError for an output that ended otherwise than by "stop" or "length"."""
    if output.finish_reason == "abort":
        message = "the server is shutting down" if is_draining else "the request was ended"
        raise unavailable(message, "shutting_down" if is_draining else "aborted", 1)
    if output.finish_reason == "error":
        raise failed_output(output.stop_reason)


async def _race(
    client: EngineClient, requests: Sequence[EngineRequest]
) -> AsyncGenerator[PromptOutput, None]:
    """Each prompt has a task; the queue holds one output a task, so that a slow reader is waited for."""
    queue: asyncio.Queue[PromptOutput | BaseException | None] = asyncio.Queue(len(requests))

    async def pump(index: int, request: EngineRequest) -> None:
        try:
            async with aclosing(client.stream(request)) as outputs:
                async for output in outputs:
                    await queue.put(PromptOutput(index, output))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(pump(index, request)) for index, request in enumerate(requests)]
    try:
        num_open = len(tasks)
        while num_open:
            found = await queue.get()
            if isinstance(found, BaseException):
                try:
                    raise found
                finally:
                    del found  # which holds this frame by its traceback, and would be held by it
            if found is None:
                num_open -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while not queue.empty():  # an error in it would hold the queue, by its traceback
            queue.get_nowait()


async def begun(events: AsyncGenerator[bytes, None]) -> Stream:
    """With the first event in hand, so that what is refused is refused with a status of its own."""
    return Stream(await anext(events, b""), events)
