"""/tokenize, /detokenize, /tokenizer_info."""

from __future__ import annotations

from typing import Any

import msgspec

from headway.server.schemas.chat import Documents, Messages, Tools
from headway.server.schemas.common import Name


class TokenizeTextRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Text to token ids."""

    prompt: str
    model: Name | None = None
    add_special_tokens: bool | None = None  # unset: as /v1/completions does
    return_token_strs: bool | None = None


class TokenizeChatRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A conversation to the token ids that /v1/chat/completions would run."""

    messages: Messages
    tools: Tools | None = None
    documents: Documents | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    model: Name | None = None
    add_special_tokens: bool | None = None  # unset: false, a template writes its own
    return_token_strs: bool | None = None


class TokenizeResponse(msgspec.Struct):
    """token_strs is null unless asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Token ids to text, special tokens spelled out."""

    tokens: list[int]
    model: Name | None = None


class DetokenizeResponse(msgspec.Struct):
    """The text."""

    prompt: str


class TokenizerInfo(msgspec.Struct):
    """What a client needs to tokenise as the server does."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
