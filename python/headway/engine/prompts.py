"""From what a caller calls a prompt to token ids: tokenizer and chat template of one model. Knows no request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from headway.errors import RequestError
from headway.request import ChatMessage, Prompt, prompt_parts
from headway.text import ChatTemplate, Tokenizer
from headway.text.parsers import detect_format
from headway.text.rendering import render_conversation


@dataclass(frozen=True)
class PromptReader:
    """Either may be missing: then what needs it raises RequestError."""

    optional_tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None

    @property
    def tokenizer(self) -> Tokenizer:
        if self.optional_tokenizer is None:
            raise RequestError(
                "prompt", "text", "token ids: this model has no tokenizer", hint="pass tokenizer="
            )
        return self.optional_tokenizer

    def read(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        """Text, where there is one, and token ids, taken as given where there are some."""
        text, token_ids = prompt_parts(prompt)
        if token_ids is not None:
            return text, token_ids
        return text, self.tokenizer.encode(text or "")


class ChatRenderer:
    """`render_chat` for what holds a reader of one model's prompts."""

    _prompts: PromptReader

    def render_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt of a conversation, as token ids beside its text. Special tokens typed into it stay text.

        Args:
            tools, documents: as the template expects them; refused where it reads none.
            continue_final_message: the model goes on with the last message; add_generation_prompt is False then.

        Raises RequestError for messages that the checkpoint's template refuses, and where it has none.
        """
        template = self._prompts.chat_template
        if template is None:
            raise RequestError(
                "messages", len(messages), "given to a model with a chat template", hint="use generate()"
            )
        for name, given in (("tools", tools), ("documents", documents)):
            if given and name not in template.variables:
                raise RequestError(name, len(given), f"unset: this model's chat template takes no {name}")
        found = render_conversation(
            template,
            self._prompts.tokenizer,
            messages,
            tags=detect_format(template.source).tags,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **(chat_template_kwargs or {}),
        )
        return cast(Prompt, {"prompt": found.text, "prompt_token_ids": found.token_ids})
