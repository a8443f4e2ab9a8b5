"""Renders a conversation as its checkpoint's prompt. The template is untrusted: it runs in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import jinja2.meta

from headway.errors import ModelLoadError, RequestError
from headway.files import read_json_object, read_text
from headway.text.render_budget import RenderLimitError
from headway.text.sandbox import SandboxEnvironment, render_within_limits
from headway.text.special_tokens import read_special_tokens

Message = Mapping[str, object]

# Names the renderer fills itself; a caller's keyword must not replace them.
RESERVED_NAMES = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
    }
)


class ChatTemplate:
    """One checkpoint's template. `source` is Jinja; `special_tokens` are the variables such as bos_token.

    `variables` are the names that the template reads and does not set: what else it is given cannot matter.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        environment = SandboxEnvironment()
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelLoadError(f"the chat template is not valid Jinja: {error}") from error

    @classmethod
    def from_dir(cls, path: str | Path) -> ChatTemplate:
        """Reads chat_template.jinja, chat_template.json or tokenizer_config.json, in this order.

        Raises ModelLoadError when the checkpoint has no template or a broken one.
        """
        template = cls.find(path)
        if template is None:
            hint = "a base model has none: use generate() with a plain prompt, or add a chat_template.jinja"
            raise ModelLoadError(f"{Path(path)} has no chat template", hint=hint)
        return template

    @classmethod
    def find(cls, path: str | Path) -> ChatTemplate | None:
        """`from_dir`, but None when the checkpoint has no template."""
        folder = Path(path)
        source = _find_source(folder)
        return None if source is None else cls(source, read_special_tokens(folder))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: object,
    ) -> str:
        """The prompt, special tokens included: encode it with add_special_tokens=False.

        continue_final_message leaves the last message open, for the model to go on with it. template_kwargs reach the
        template as they are (enable_thinking=False, say). Raises RequestError when the template refuses the messages.
        """
        _check_messages(messages)
        _check_kwargs(template_kwargs, add_generation_prompt and continue_final_message)
        variables = {**self.special_tokens, **template_kwargs, "messages": [dict(m) for m in messages]}
        variables |= {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        try:
            text = render_within_limits(self._template, variables, len(messages))
        except (jinja2.TemplateError, RenderLimitError, RecursionError) as error:
            raise _refusal(messages, f"{type(error).__name__}: {error}") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise _refusal(messages, f"{type(error).__name__}: {error}") from error
        return _cut_after(text, messages) if continue_final_message else text


def _find_source(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        source = _default_of(read_json_object(folder / name, is_optional=True).get("chat_template"))
        if source is not None:
            return source
    return None


def _default_of(value: object) -> str | None:
    """A template is a string, or a list of named ones: [{"name": "default", "template": "..."}]."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        template = named.get("default")
        return template if isinstance(template, str) else None
    return None


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, (str, bytes)) or not messages:
        raise RequestError("messages", messages, "a non-empty list of messages with role and content")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError("messages", message, "mappings with a role")


def _check_kwargs(template_kwargs: Mapping[str, object], is_contradictory: bool) -> None:
    reserved = sorted(RESERVED_NAMES.intersection(template_kwargs))
    if reserved:
        raise RequestError("template_kwargs", reserved, "names that the template alone reads")
    if is_contradictory:
        limit = "False with add_generation_prompt, which opens a new message"
        raise RequestError("continue_final_message", True, limit)


def _refusal(messages: Sequence[Message], reason: str) -> RequestError:
    roles = [message["role"] for message in messages]
    return RequestError("messages", roles, f"a conversation that the chat template accepts ({reason})")


def _cut_after(text: str, messages: Sequence[Message]) -> str:
    """Everything up to the end of the last message's content; templates often strip it, so try it stripped too."""
    content = messages[-1].get("content")
    if isinstance(content, str):
        for candidate in (content, content.strip()):
            start = text.rfind(candidate)
            if candidate and start >= 0:
                return text[: start + len(candidate)]
    raise RequestError(
        "continue_final_message", True, "False when the last message's content is not in the prompt"
    )
