"""POST /v1/chat/completions: a conversation in, an answer with its reasoning and tool calls out, whole or streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from headway.outputs import PromptLogprobs
from headway.server.answers import Answer, delta_of, message_of
from headway.server.calls import Call, Reply, Stream, json_reply
from headway.server.conversation import check_template_kwargs, conversation_prompt
from headway.server.errors import bad_request
from headway.server.generation import PromptOutput, PromptTokens, UsageCount, begun, engine_requests, run
from headway.server.logprobs import TokenNames, chat_logprobs, prompt_logprobs_json
from headway.server.sampling import check_length, num_kept_tokens, sampling_params
from headway.server.schemas.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    MessageDelta,
)
from headway.server.sse import TextEvent, event
from headway.server.state import ServerState
from headway.server.structured import structured_outputs
from headway.server.tools import ToolPlan, plan_tools
from headway.text.parsers import Content, Piece, joined


async def chat_completions(call: Call, fields: ChatRequest) -> Reply | Stream:
    """Refuses what it can before it queues anything; a stream begins when its first output is there."""
    state = call.state
    model = state.check_model(fields.model)
    plan = plan_tools(state, fields)
    kwargs = _check(state, fields)
    prompt = await conversation_prompt(state, fields, plan.shown, kwargs=kwargs)
    num_kept = num_kept_tokens(fields, _asked_tokens(fields), state.info.max_model_len)
    if num_kept is not None:
        prompt = PromptTokens(prompt.text, prompt.token_ids[-num_kept:])
    job = _Job(call, fields, model, prompt, plan)
    if fields.stream:
        return await begun(job.stream())
    return json_reply(await job.whole())


def _check(state: ServerState, fields: ChatRequest) -> dict[str, Any]:
    """What the fields say to the template. Raises ApiError for what cannot be said."""
    check_template_kwargs(fields)
    if fields.echo:
        raise bad_request("echo", "echo is not supported for chat")
    if fields.top_logprobs and not fields.logprobs:
        raise bad_request("top_logprobs", "top_logprobs goes with logprobs=true alone")
    effort = fields.reasoning_effort
    known = state.chat_template.variables if state.chat_template else frozenset()
    if effort is None:
        return {}
    if "reasoning_effort" in known:
        return {"reasoning_effort": effort}
    if effort == "none":
        return {"enable_thinking": False} if "enable_thinking" in known else {}
    raise bad_request("reasoning_effort", "this model's chat template has no reasoning_effort")


class _Job:
    """One request: checked, then run once, as a whole or as a stream."""

    def __init__(
        self, call: Call, fields: ChatRequest, model: str, prompt: PromptTokens, plan: ToolPlan
    ) -> None:
        state = call.state
        self._call = call
        self._fields = fields
        self._model = model
        self._prompt = prompt
        self._plan = plan
        self._id = "chatcmpl-" + (fields.request_id or call.request_id)
        self._created_s = int(time.time())
        params = sampling_params(fields, state.default_params, **self._changes(state))
        self._requests = engine_requests(call, self._id, fields, [prompt], params)
        self._names = TokenNames(state.tokenizer, as_ids=bool(fields.return_tokens_as_token_ids))
        self._usage = UsageCount()
        self._prompt_logprobs: PromptLogprobs | None = None
        text = prompt.text or ""
        self._answers = [
            Answer(
                plan.parser(state.output_format, text), plan.max_calls, fields.include_reasoning is not False
            )
            for _ in range(params.n)
        ]

    def _changes(self, state: ServerState) -> dict[str, Any]:
        """Without a limit of the caller's, the answer ends where the context does."""
        fields = self._fields
        asked = _asked_tokens(fields)
        check_length(len(self._prompt.token_ids), asked, state.info.max_model_len)
        changes: dict[str, Any] = {"max_tokens": asked, **structured_outputs(fields, self._plan.schema)}
        if fields.logprobs:
            changes["logprobs"] = fields.top_logprobs or 0
        tags = self._plan.tags(state.output_format)
        if fields.skip_special_tokens is None and state.tokenizer is not None and tags:
            special = {state.tokenizer.id_to_token(token_id) for token_id in state.tokenizer.special_ids}
            if special.intersection(tags):
                changes["skip_special_tokens"] = False
        return changes

    async def whole(self) -> ChatResponse:
        pieces: list[list[Piece]] = [[] for _ in self._answers]
        async with aclosing(run(self._call, self._requests)) as outputs:
            async for found in outputs:
                pieces[found.output.index] += await self._add(found)
        choices = [self._choice(index, joined(found)) for index, found in enumerate(pieces)]
        return ChatResponse(
            self._id,
            self._created_s,
            self._model,
            choices,
            self._usage.info(),
            prompt_logprobs=prompt_logprobs_json(self._names, self._prompt_logprobs),
            prompt_token_ids=self._prompt.token_ids if self._fields.return_token_ids else None,
        )

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Role first, then an event for each piece, then one that says why it ended."""
        async with aclosing(run(self._call, self._requests)) as outputs:
            async for found in outputs:
                events = self._events(found.output.index, await self._add(found))
                if events:
                    yield b"".join(events)
        if self._fields.wants_usage:
            yield event(ChatChunk(self._id, self._created_s, self._model, [], usage=self._usage.info()))

    async def _add(self, found: PromptOutput) -> list[Piece]:
        """Notes an output with its answer and returns what it says."""
        output = found.output
        answer = self._answers[output.index]
        self._usage.note(found)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        pieces = answer.add(output)
        if answer.reasoning and answer.finish_reason is not None:
            self._usage.num_reasoning_tokens += await self._num_tokens("".join(answer.reasoning))
        return pieces

    async def _num_tokens(self, text: str) -> int:
        """As many as the text has by itself: where the model cut it is not known here."""
        state = self._call.state
        tokenizer = state.need_tokenizer("messages")
        return await state.on_thread(len(text), lambda: len(tokenizer.encode(text, add_special_tokens=False)))

    def _choice(self, index: int, pieces: list[Piece]) -> ChatChoice:
        answer = self._answers[index]
        return ChatChoice(
            index,
            message_of(pieces),
            self._logprobs(answer),
            answer.finish_reason,
            answer.stop_reason,
            token_ids=answer.token_ids if self._fields.return_token_ids else None,
        )

    def _logprobs(self, answer: Answer) -> ChatLogprobs | None:
        if not self._fields.logprobs:
            return None
        return chat_logprobs(self._names, answer.token_ids, answer.logprobs, self._fields.top_logprobs or 0)

    def _events(self, index: int, pieces: list[Piece]) -> list[bytes]:
        answer = self._answers[index]
        events = []
        if not answer.is_begun and (pieces or answer.finish_reason):
            answer.is_begun = True
            events.append(self._first_event(index))
        for piece in pieces:
            if self._has_text_alone and isinstance(piece, Content):
                events.append(self._text_event(index).of(piece.text))
                answer.token_ids, answer.logprobs = [], []
                continue
            choice = ChatChunkChoice(index, delta_of(piece), None)
            self._attach_tokens(answer, choice)
            events.append(self._event(choice))
        if answer.finish_reason is not None:
            choice = ChatChunkChoice(
                index, MessageDelta(), answer.finish_reason, stop_reason=answer.stop_reason
            )
            self._attach_tokens(answer, choice)
            events.append(self._event(choice))
        return events

    def _text_event(self, index: int) -> TextEvent:
        answer = self._answers[index]
        if answer.text_event is None:
            hole = ChatChunkChoice(index, delta_of(Content(TextEvent.HOLE)), None)
            answer.text_event = TextEvent(self._chunk(hole))
        return answer.text_event

    @property
    def _has_text_alone(self) -> bool:
        """Events with new text of an answer's own."""
        fields = self._fields
        return not (fields.logprobs or fields.return_token_ids or fields.wants_continuous_usage)

    def _attach_tokens(self, answer: Answer, choice: ChatChunkChoice) -> None:
        """Tokens go with the first event after them, once."""
        if answer.token_ids:
            choice.logprobs = self._logprobs(answer)
            choice.token_ids = answer.token_ids if self._fields.return_token_ids else None
            answer.token_ids, answer.logprobs = [], []

    def _first_event(self, index: int) -> bytes:
        """The role, and what there is to say of the prompt."""
        chunk = self._chunk(ChatChunkChoice(index, MessageDelta(role="assistant", content=""), None))
        if self._fields.return_token_ids:
            chunk.prompt_token_ids = self._prompt.token_ids
        if index == 0:
            chunk.prompt_logprobs = prompt_logprobs_json(self._names, self._prompt_logprobs)
        return event(chunk)

    def _event(self, choice: ChatChunkChoice) -> bytes:
        return event(self._chunk(choice))

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        usage = self._usage.info() if self._fields.wants_continuous_usage else None
        return ChatChunk(self._id, self._created_s, self._model, [choice], usage=usage)


def _asked_tokens(fields: ChatRequest) -> int | None:
    """The newer name goes first."""
    return fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
