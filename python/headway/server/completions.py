"""POST /v1/completions: prompts as text or ids, one or many, with echo and logprobs, whole or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from headway.outputs import PromptLogprobs, TokenLogprobs
from headway.server.calls import Call, Reply, Stream, json_reply
from headway.server.client import EngineOutput
from headway.server.errors import ApiError, bad_request
from headway.server.generation import PromptOutput, PromptTokens, UsageCount, begun, engine_requests, run
from headway.server.logprobs import CompletionLogprobsWriter, TextOffsets, TokenNames, prompt_logprobs_json
from headway.server.sampling import check_length, num_kept_tokens, sampling_params
from headway.server.schemas.common import FinishReason, UsageInfo
from headway.server.schemas.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from headway.server.sse import TextEvent, event
from headway.server.structured import structured_outputs


async def completions(call: Call, fields: CompletionRequest) -> Reply | Stream:
    """Refuses what it can before it queues anything; a stream begins when its first output is there."""
    model = call.state.check_model(fields.model)
    job = _Job(call, fields, model, await _prompts(call, fields))
    if fields.stream:
        return await begun(job.stream())
    return json_reply(await job.whole())


async def _prompts(call: Call, fields: CompletionRequest) -> list[PromptTokens]:
    """Every prompt as ids, its text beside it where there is one or echo needs it."""
    prompt = fields.prompt
    items = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
    if not items:
        raise bad_request("prompt", "prompt must hold at least one prompt")
    encoded = iter(await _encoded(call, fields, [item for item in items if isinstance(item, str)]))
    return [_prompt(call, fields, item, next(encoded) if isinstance(item, str) else item) for item in items]


async def _encoded(call: Call, fields: CompletionRequest, texts: list[str]) -> list[list[int]]:
    """Many short ones take as long as a long one: the event loop waits for neither."""
    if not texts:
        return []
    tokenizer, add_special = call.state.need_tokenizer("prompt"), fields.add_special_tokens is not False
    num_chars = sum(map(len, texts))
    return await call.state.on_thread(
        num_chars, lambda: [tokenizer.encode(text, add_special) for text in texts]
    )


def _prompt(call: Call, fields: CompletionRequest, item: object, token_ids: object) -> PromptTokens:
    """What takes time in proportion to the prompt comes after its length is known to fit."""
    state = call.state
    if not isinstance(token_ids, list):
        raise _bad_prompt()
    num_kept = num_kept_tokens(fields, fields.max_tokens, state.info.max_model_len)
    kept = token_ids if num_kept is None else token_ids[-num_kept:]
    if not kept:
        raise bad_request("prompt", "prompt must have at least one token")
    check_length(len(kept), fields.max_tokens, state.info.max_model_len)
    if isinstance(item, str) and len(kept) == len(token_ids):
        return PromptTokens(item, kept)
    return _prompt_of_ids(call, fields, kept)


def _prompt_of_ids(call: Call, fields: CompletionRequest, token_ids: list[int]) -> PromptTokens:
    state = call.state
    if not all(isinstance(token, int) for token in token_ids):
        raise _bad_prompt()
    if max(token_ids) >= state.info.vocab_size:
        raise bad_request("prompt", f"token ids are below {state.info.vocab_size}, got {max(token_ids)}")
    if not fields.echo:
        return PromptTokens(None, token_ids)
    tokenizer = state.need_tokenizer("echo")
    return PromptTokens(tokenizer.decode(token_ids, skip_special_tokens=False), token_ids)


def _bad_prompt() -> ApiError:
    return bad_request("prompt", "prompt must be text, token ids, or a list of one of these")


@dataclass(slots=True)
class _Choice:
    """One completion of one prompt so far."""

    writer: CompletionLogprobsWriter | None
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    is_begun: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    text_event: TextEvent | None = None  # once it was needed


class _Job:
    """One request: checked, then run once, as a whole or as a stream."""

    def __init__(
        self, call: Call, fields: CompletionRequest, model: str, prompts: list[PromptTokens]
    ) -> None:
        self._call = call
        self._fields = fields
        self._model = model
        self._prompts = prompts
        self._echo = bool(fields.echo)
        self._is_echo_alone = fields.max_tokens == 0
        self._refuse()
        self._id = "cmpl-" + (fields.request_id or call.request_id)
        self._created_s = int(time.time())
        params = sampling_params(fields, call.state.default_params, **self._changes())
        self._n = params.n
        self._requests = engine_requests(call, self._id, fields, prompts, params)
        self._names = TokenNames(call.state.tokenizer, as_ids=bool(fields.return_tokens_as_token_ids))
        self._usage = UsageCount(without_output=self._is_echo_alone)
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}
        self._choices = [
            _Choice(self._writer(prompt, params.skip_special_tokens))
            for prompt in prompts
            for _ in range(params.n)
        ]

    def _refuse(self) -> None:
        fields = self._fields
        if fields.suffix:
            raise bad_request("suffix", "suffix is not supported: no model here fills in the middle")
        if fields.best_of is not None and fields.best_of != (fields.n or 1):
            raise bad_request("best_of", "best_of must be n, or left out")
        if self._is_echo_alone and not self._echo:
            raise bad_request("max_tokens", "max_tokens may be 0 with echo alone")

    def _changes(self) -> dict[str, object]:
        """Logprobs of an echoed prompt come from the engine as prompt_logprobs."""
        fields = self._fields
        changes: dict[str, object] = dict(structured_outputs(fields))
        if fields.max_tokens is not None:
            changes["max_tokens"] = 1 if self._is_echo_alone else fields.max_tokens
        if fields.logprobs is not None:
            changes["logprobs"] = fields.logprobs
            if self._echo:
                changes["prompt_logprobs"] = _wider(fields.logprobs, fields.prompt_logprobs)
        return changes

    def _writer(self, prompt: PromptTokens, skips_special: bool) -> CompletionLogprobsWriter | None:
        num_top = self._fields.logprobs
        if num_top is None:
            return None
        if num_top < 0:  # the whole vocabulary
            num_top = self._call.state.info.vocab_size
        echoed = (prompt.text or "") if self._echo else None
        tokenizer = self._call.state.tokenizer
        offsets = TextOffsets(tokenizer, prompt.token_ids, echoed, skips_special=skips_special)
        return CompletionLogprobsWriter(self._names, num_top, offsets)

    async def whole(self) -> CompletionResponse:
        async with aclosing(run(self._call, self._requests)) as outputs:
            async for found in outputs:
                self._add(found)
        choices = [self._choice(index) for index in range(len(self._choices))]
        return self._response(choices, self._usage.info())

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """An event for every output that has text, or ends a choice. Tokens without text wait for the next one."""
        async with aclosing(run(self._call, self._requests)) as outputs:
            async for found in outputs:
                index = self._add(found)
                choice = self._choices[index]
                if any(choice.pieces) or choice.finish_reason or (self._echo and not choice.is_begun):
                    yield self._event(index)
        if self._fields.wants_usage:
            yield event(self._response([], self._usage.info()))

    def _event(self, index: int) -> bytes:
        choice = self._choices[index]
        if self._has_text_alone and choice.finish_reason is None:
            text = "".join(choice.pieces)
            choice.pieces, choice.token_ids = [], []
            if choice.text_event is None:
                hole = CompletionChoice(index, TextEvent.HOLE, None, None, None)
                choice.text_event = TextEvent(self._response([hole]))
            return choice.text_event.of(text)
        usage = self._usage.info() if self._fields.wants_continuous_usage else None
        return event(self._response([self._choice(index)], usage))

    def _response(
        self, choices: list[CompletionChoice], usage: UsageInfo | None = None
    ) -> CompletionResponse:
        return CompletionResponse(self._id, self._created_s, self._model, choices, usage=usage)

    @property
    def _has_text_alone(self) -> bool:
        """Events but the last of a choice."""
        fields = self._fields
        is_plain = fields.logprobs is None and fields.prompt_logprobs is None and not fields.return_token_ids
        return is_plain and not self._echo and not fields.wants_continuous_usage

    def _add(self, found: PromptOutput) -> int:
        """Notes an output with its choice, whose index it returns: prompts in order, n choices each."""
        output = found.output
        self._usage.note(found)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[found.prompt_index] = output.prompt_logprobs
        index = found.prompt_index * self._n + output.index
        choice = self._choices[index]
        choice.finish_reason = output.finish_reason  # type: ignore[assignment]  # check_end let only these pass
        choice.stop_reason = output.stop_reason
        if self._is_echo_alone:
            choice.finish_reason = "length" if output.finish_reason else None
        else:
            self._grow(choice, output)
        return index

    @staticmethod
    def _grow(choice: _Choice, output: EngineOutput) -> None:
        choice.pieces.append(output.text)
        choice.token_ids += output.token_ids
        if output.logprobs is not None:
            choice.logprobs += output.logprobs

    def _choice(self, index: int) -> CompletionChoice:
        """What the choice has gained since it was last asked, the echoed prompt before all else."""
        choice = self._choices[index]
        prompt_index = index // self._n
        is_first, choice.is_begun = not choice.is_begun, True
        token_ids = choice.token_ids
        if is_first and self._echo:
            self._put_prompt_first(choice, prompt_index)
        reply = CompletionChoice(
            index=index,
            text="".join(choice.pieces),
            logprobs=self._logprobs(choice),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )
        if is_first and self._fields.prompt_logprobs is not None:
            found = self._prompt_logprobs.get(prompt_index)
            reply.prompt_logprobs = prompt_logprobs_json(self._names, found)
        if self._fields.return_token_ids:
            reply.token_ids = token_ids
            reply.prompt_token_ids = self._prompts[prompt_index].token_ids if is_first else None
        choice.pieces, choice.token_ids, choice.logprobs = [], [], []
        return reply

    def _put_prompt_first(self, choice: _Choice, prompt_index: int) -> None:
        prompt = self._prompts[prompt_index]
        choice.pieces.insert(0, prompt.text or "")
        if choice.writer is None:
            return
        entries = self._prompt_logprobs.get(prompt_index) or [None] * len(prompt.token_ids)
        choice.token_ids = prompt.token_ids + choice.token_ids
        choice.logprobs = [*entries, *choice.logprobs]

    def _logprobs(self, choice: _Choice) -> CompletionLogprobs | None:
        return None if choice.writer is None else choice.writer.write(choice.token_ids, choice.logprobs)


def _wider(one: int, other: int | None) -> int:
    """Of two numbers of alternatives, where -1 is all there are."""
    return one if other is None else -1 if -1 in (one, other) else max(one, other)
