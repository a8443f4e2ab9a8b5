"""/tokenize, /detokenize, /tokenizer_info: what a client needs to count and score tokens as the server does."""

from __future__ import annotations

import msgspec

from headway.server.calls import Call, Reply, json_reply
from headway.server.conversation import check_template_kwargs, conversation_prompt, template_tools
from headway.server.errors import bad_request
from headway.server.schemas.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChatRequest,
    TokenizeResponse,
    TokenizerInfo,
    TokenizeTextRequest,
)


class _Keys(msgspec.Struct):
    """Whether a body has messages; all else is skipped."""

    messages: msgspec.Raw = msgspec.Raw()


def tokenize_kind(body: bytes) -> type[msgspec.Struct]:
    """Which of the two requests a body is."""
    try:
        has_messages = bool(bytes(msgspec.json.decode(body, type=_Keys).messages))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return TokenizeTextRequest  # which says what is wrong with it
    return TokenizeChatRequest if has_messages else TokenizeTextRequest


async def tokenize(call: Call, fields: TokenizeTextRequest | TokenizeChatRequest) -> Reply:
    state = call.state
    state.check_model(fields.model)
    tokenizer = state.need_tokenizer("prompt")
    if isinstance(fields, TokenizeTextRequest):
        text, add_special = fields.prompt, fields.add_special_tokens is not False
        token_ids = await state.on_thread(len(text), lambda: tokenizer.encode(text, add_special))
    else:
        check_template_kwargs(fields)
        tools = template_tools(fields.tools)
        prompt = await conversation_prompt(
            state, fields, tools, add_special_tokens=bool(fields.add_special_tokens)
        )
        token_ids = prompt.token_ids
    names = [tokenizer.id_to_token(i) or "" for i in token_ids] if fields.return_token_strs else None
    return json_reply(TokenizeResponse(len(token_ids), state.info.max_model_len, token_ids, names))


async def detokenize(call: Call, fields: DetokenizeRequest) -> Reply:
    state = call.state
    state.check_model(fields.model)
    tokenizer = state.need_tokenizer("tokens")
    vocab_size = state.info.vocab_size

    def text() -> str:
        for token in fields.tokens:
            if not 0 <= token < vocab_size:
                raise bad_request("tokens", f"token ids are in [0, {vocab_size}), got {str(token)[:20]}")
        return tokenizer.decode(fields.tokens, skip_special_tokens=False)

    return json_reply(DetokenizeResponse(await state.on_thread(4 * len(fields.tokens), text)))


async def tokenizer_info(call: Call, _: None) -> Reply:
    state = call.state
    tokenizer = state.need_tokenizer("tokenizer")
    tokens = tokenizer.special_tokens
    return json_reply(
        TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            vocab_size=tokenizer.vocab_size,
            model_max_length=state.info.max_model_len,
            bos_token=tokens.get("bos_token"),
            eos_token=tokens.get("eos_token"),
            pad_token=tokens.get("pad_token"),
            unk_token=tokens.get("unk_token"),
            chat_template=state.chat_template.source if state.chat_template else None,
        )
    )
