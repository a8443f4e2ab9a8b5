"""Messages, tools and template arguments of a request -> the prompt as text and token ids."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from headway.server.decode import check_depth
from headway.server.errors import bad_request
from headway.server.generation import PromptTokens
from headway.server.schemas.chat import ContentPart, Conversation, Message, Tool, ToolCall
from headway.server.state import ServerState
from headway.text import ChatTemplate
from headway.text.chat_template import RESERVED_NAMES
from headway.text.rendering import render_conversation


async def conversation_prompt(
    state: ServerState,
    fields: Conversation,
    tools: list[dict[str, Any]] | None,
    *,
    kwargs: dict[str, Any] | None = None,
    add_special_tokens: bool = False,
) -> PromptTokens:
    """kwargs: template arguments beside those of the request. Raises ApiError or RequestError."""
    template, tokenizer = _template_for(state, fields), state.need_tokenizer("messages")
    messages = [_template_message(message, i) for i, message in enumerate(fields.messages)]
    arguments = {**(fields.chat_template_kwargs or {}), **(kwargs or {}), **_opening(fields)}

    def render() -> PromptTokens:
        found = render_conversation(
            template,
            tokenizer,
            messages,
            tags=state.output_format.tags,
            add_special_tokens=add_special_tokens,
            tools=tools,
            documents=fields.documents,
            **arguments,
        )
        return PromptTokens(found.text, found.token_ids)

    num_chars = sum(len(message["content"]) for message in messages)
    num_chars += 200 * len(tools or ()) + 2000 * len(fields.documents or ())
    return await state.on_thread(num_chars, render)


def _template_for(state: ServerState, fields: Conversation) -> ChatTemplate:
    template = need_template(state)
    if fields.documents and "documents" not in template.variables:
        raise bad_request("documents", "this model's chat template takes no documents")
    return template


def _opening(fields: Conversation) -> dict[str, bool]:
    """Whether the model begins a message or goes on with the last one."""
    continues = bool(fields.continue_final_message)
    opens = not continues if fields.add_generation_prompt is None else fields.add_generation_prompt
    return {"add_generation_prompt": opens, "continue_final_message": continues}


def need_template(state: ServerState) -> ChatTemplate:
    if state.chat_template is None:
        raise bad_request(
            "messages", "this model has no chat template: use /v1/completions, or --chat-template"
        )
    return state.chat_template


def check_template_kwargs(fields: Conversation) -> None:
    for name in fields.chat_template_kwargs or {}:
        if not name.isidentifier() or name in RESERVED_NAMES or name == "continue_final_message":
            raise bad_request(
                "chat_template_kwargs", f"{name[:100]!r} is not a template argument of yours to set"
            )


def template_tools(tools: list[Tool] | None) -> list[dict[str, Any]] | None:
    """As templates expect them; None for none at all."""
    if not tools:
        return None
    for index, tool in enumerate(tools):
        check_depth(f"tools[{index}].function.parameters", tool.function.parameters)
    found: list[dict[str, Any]] = []
    for tool in tools:
        function = {k: v for k, v in msgspec.to_builtins(tool.function).items() if v is not None}
        found.append({"type": "function", "function": function})
    return found


def _template_message(message: Message, index: int) -> dict[str, Any]:
    """Roles and keys that templates know. A developer's message is a system message to them."""
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": _content(message, index)}
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    if message.tool_calls:
        found["tool_calls"] = [_template_call(call, index) for call in message.tool_calls]
    reasoning = message.reasoning or message.reasoning_content
    if reasoning:
        found["reasoning_content"] = reasoning
    return found


def _content(message: Message, index: int) -> str:
    """Text; parts are joined by line feeds. Only an assistant that called tools may have said nothing."""
    content = message.content
    if isinstance(content, list):
        return "\n".join(_part_text(part, index) for part in content)
    if content is None and message.role not in ("assistant", "tool"):
        raise bad_request(f"messages[{index}].content", f"a message of role {message.role} must have content")
    return content or ""


def _part_text(part: ContentPart, index: int) -> str:
    if part.type not in ("text", "input_text", "output_text", "refusal") or part.text is None:
        raise bad_request(
            f"messages[{index}].content",
            f"only text parts are served, got {part.type[:50]!r}",
            "unsupported_content",
        )
    return part.text


def _template_call(call: ToolCall, index: int) -> dict[str, Any]:
    """Templates write arguments out themselves, so that they want the object and not its text."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise bad_request(f"messages[{index}].tool_calls", "arguments must be JSON") from error
    check_depth(f"messages[{index}].tool_calls", arguments)
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }
