"""What completions and chat share: sampling fields, fields taken and not read, usage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_NAME_CHARS = 512

StopText = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_STOP_CHARS)]
StopList = Annotated[list[StopText], msgspec.Meta(max_length=MAX_STOPS)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], msgspec.Meta(max_length=2**16)]
RequestId = Annotated[
    str, msgspec.Meta(max_length=MAX_NAME_CHARS, pattern=r"^[!-~]*$(?!\n)")
]  # it goes into log lines
Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]


# Taken and not read: they change no answer here.
IGNORED_FIELDS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "session_id",
)


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream carries beside its text."""

    include_usage: bool | None = None  # one more event before [DONE], without choices
    continuous_usage_stats: bool | None = None  # usage on every event
    include_obfuscation: bool | None = None  # taken and not read: nothing is padded here


class ResponseFormat(msgspec.Struct):
    """text, json_object, or json_schema with {"schema": ...}."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """Exactly one of them."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class SamplingFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of both kinds of request. null is the same as left out."""

    model: Name | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: StopText | StopList | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: StopList | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, msgspec.Meta(ge=-1, lt=2**31)] | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)] | None = None
    request_id: RequestId | None = None
    cache_salt: Name | None = None
    use_prefix_cache: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    # IGNORED_FIELDS
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    session_id: Any = None

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class PromptTokensDetails(msgspec.Struct):
    """Of the prompt's tokens, those found in the prefix cache."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct):
    """Of the output's tokens, those that were reasoning."""

    reasoning_tokens: int = 0


class UsageInfo(msgspec.Struct):
    """Tokens of all prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


# What the engine calls "abort" ends a reply with an error, never with a reason.
FinishReason = Literal["stop", "length", "tool_calls"]
