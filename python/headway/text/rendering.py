"""A conversation -> its prompt as text and token ids, with a checkpoint's template and tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from headway.text.chat_template import ChatTemplate
from headway.text.literals import Encoded, Literals
from headway.text.tokenizer import Tokenizer


def render_conversation(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tags: Collection[str] = (),
    add_special_tokens: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **arguments: Any,
) -> Encoded:
    """Special tokens that somebody typed into messages, tools or documents stay text.

    Args:
        tags: that the model itself writes; in its own turns they stay what they are, for templates look for them.
        **arguments: see `ChatTemplate.render`.

    Raises RequestError for messages that the template refuses.
    """
    literals = Literals(tokenizer)
    text = template.render(
        [_hidden(literals, message, tags) for message in messages],
        tools=literals.hide(tools),  # type: ignore[arg-type]  # a list stays a list
        documents=literals.hide(documents),  # type: ignore[arg-type]
        **arguments,
    )
    return literals.encode(text, add_special_tokens=add_special_tokens)


def _hidden(literals: Literals, message: Mapping[str, Any], tags: Collection[str]) -> Mapping[str, Any]:
    if not isinstance(message, Mapping):  # which the template refuses
        return message
    kept = tuple(tags) if message.get("role") == "assistant" else ()
    return {key: literals.hide(value, kept) for key, value in message.items()}
