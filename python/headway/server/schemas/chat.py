"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

import msgspec

from headway.server.schemas.common import FinishReason, SamplingFields, UsageInfo

MAX_MESSAGES = 4096
MAX_TOOLS = 256
MAX_DOCUMENTS = 1024

Role = Literal["system", "developer", "user", "assistant", "tool"]


class ContentPart(msgspec.Struct):
    """Only text is served."""

    type: str
    text: str | None = None


class FunctionCall(msgspec.Struct):
    """`arguments` is JSON as text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call that the model asks for."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class Message(msgspec.Struct):
    """One turn. Fields of other names are not read: SDKs send back what they got."""

    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class FunctionDefinition(msgspec.Struct):
    """`parameters` is a JSON schema."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    """A function that the model may call."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct):
    """Its name."""

    name: str


class NamedToolChoice(msgspec.Struct):
    """The one function to call."""

    function: NamedFunction
    type: Literal["function"] = "function"


Messages = Annotated[list[Message], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
Documents = Annotated[list[dict[str, Any]], msgspec.Meta(max_length=MAX_DOCUMENTS)]
Tools = Annotated[list[Tool], msgspec.Meta(max_length=MAX_TOOLS)]


class Conversation(Protocol):
    """What makes a prompt of a conversation; /tokenize reads it too."""

    messages: list[Message]
    tools: list[Tool] | None
    documents: list[dict[str, Any]] | None
    chat_template_kwargs: dict[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None


class ChatRequest(SamplingFields, forbid_unknown_fields=True, kw_only=True):
    """A conversation to answer. max_completion_tokens goes before max_tokens; left out, the context is the limit."""

    messages: Messages
    tools: Tools | None = None
    documents: Documents | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    include_reasoning: bool | None = None
    echo: bool | None = None  # refused unless false


class TopLogprob(msgspec.Struct):
    """A token that could have been."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    """A token that is."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """One entry a token of the answer, tags of tools and reasoning among them."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(msgspec.Struct, omit_defaults=True):
    """The answer. `reasoning_content` repeats `reasoning` for clients that know the older name."""

    content: str | None
    role: Literal["assistant"] = msgspec.field(default_factory=lambda: "assistant")
    refusal: str | None = msgspec.field(default_factory=lambda: None)
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatChoice(msgspec.Struct, omit_defaults=True):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatResponse(msgspec.Struct, omit_defaults=True):
    """A whole answer."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageInfo
    object: Literal["chat.completion"] = msgspec.field(default_factory=lambda: "chat.completion")
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    """The name comes once, with the first piece."""

    arguments: str
    name: str | None = None


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """What a call gained. id and type come once."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: Literal["function"] | None = None


class MessageDelta(msgspec.Struct, omit_defaults=True):
    """What an answer gained."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatChunkChoice(msgspec.Struct, omit_defaults=True):
    """One answer's part of an event."""

    index: int
    delta: MessageDelta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatChunk(msgspec.Struct, omit_defaults=True):
    """One event of a stream."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = msgspec.field(default_factory=lambda: "chat.completion.chunk")
    usage: UsageInfo | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None  # with the first answer's first event
    prompt_token_ids: list[int] | None = None
