"""POST /v1/completions."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from headway.server.schemas.common import FinishReason, SamplingFields, TokenId, UsageInfo


class CompletionRequest(SamplingFields, forbid_unknown_fields=True, kw_only=True):
    """A prompt is text, token ids, or a list of either. max_tokens may be 0 with echo."""

    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None  # refused unless empty: no model here fills in the middle
    best_of: int | None = None  # refused unless it is n
    add_special_tokens: bool | None = None


class CompletionLogprobs(msgspec.Struct):
    """One entry a token. What has no logprob, such as the prompt's first token, is null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # characters of the choice's text before the token


class CompletionChoice(msgspec.Struct, omit_defaults=True):
    """One completion, or what it gained."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(msgspec.Struct, omit_defaults=True):
    """Also one event of a stream, which has usage only where it was asked for."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = msgspec.field(default_factory=lambda: "text_completion")
    usage: UsageInfo | None = None
