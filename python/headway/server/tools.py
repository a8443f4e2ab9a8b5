"""Which tools an answer may or must call, what its text must look like for that, and who reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headway.server.conversation import need_template, template_tools
from headway.server.errors import bad_request
from headway.server.schemas.chat import ChatRequest, NamedToolChoice
from headway.server.state import ServerState
from headway.text.parsers import OutputFormat, OutputParser
from headway.text.parsers.formats import forced_calls_parser


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """`shown` are the tools the template writes; `schema` is set where the answer must be a list of calls."""

    shown: list[dict[str, Any]] | None
    schema: dict[str, Any] | None
    max_calls: int | None  # calls beyond it are left out of the answer

    def parser(self, form: OutputFormat, prompt: str) -> OutputParser:
        return forced_calls_parser() if self.schema is not None else form.parser(prompt, self.shown)

    def tags(self, form: OutputFormat) -> tuple[str, ...]:
        """Tags that must reach the parser."""
        return () if self.schema is not None else form.tags


def plan_tools(state: ServerState, fields: ChatRequest) -> ToolPlan:
    """Raises ApiError for tools that this model cannot be told of, or whose calls nobody could read."""
    tools = template_tools(fields.tools)
    choice = fields.tool_choice
    if tools is None:
        if choice not in (None, "none", "auto"):
            raise bad_request("tool_choice", "tool_choice needs tools")
        return ToolPlan(None, None, None)
    if choice == "none":
        return ToolPlan(None, None, None)
    if "tools" not in need_template(state).variables:
        raise bad_request("tools", "this model's chat template takes no tools", "unsupported_tools")
    max_calls = 1 if fields.parallel_tool_calls is False else None
    if choice is None or choice == "auto":
        if state.output_format.tools is None:
            raise bad_request("tools", "nobody knows how this model writes calls: set --tool-call-parser")
        return ToolPlan(tools, None, max_calls)
    if isinstance(choice, NamedToolChoice):
        return ToolPlan(tools, _calls_schema(_named(tools, choice.function.name), 1), 1)
    return ToolPlan(tools, _calls_schema(tools, max_calls), max_calls)


def _named(tools: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    found = [tool for tool in tools if tool["function"]["name"] == name]
    if not found:
        raise bad_request("tool_choice", f"no tool has the name {name[:128]!r}")
    return found


def _calls_schema(tools: list[dict[str, Any]], max_calls: int | None) -> dict[str, Any]:
    """A list of calls as `JsonCallReader` reads them."""
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call_schema(tool["function"], place) for place, tool in enumerate(tools)]},
    }
    return schema | ({} if max_calls is None else {"maxItems": max_calls})


def _call_schema(function: dict[str, Any], place: int) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": _moved(parameters, f"#/items/anyOf/{place}/properties/arguments"),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(node: Any, root: str) -> Any:
    """A schema whose references are from `#`, as they must read where it is part of another one, at `root`. Under an
    `$id` of its own they stay.
    """
    if isinstance(node, list):
        return [_moved(each, root) for each in node]
    if not isinstance(node, dict) or isinstance(node.get("$id"), str):
        return node
    moved = {key: _moved(value, root) for key, value in node.items()}
    reference = node.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = root + reference[1:]
    return moved
