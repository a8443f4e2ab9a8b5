"""Which format a model writes in, and a parser for one answer in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headway.text.parsers.pieces import Content, Piece, Reasoning, joined
from headway.text.parsers.reasoning import GRANITE, THINK, ReasoningParser, ReasoningTags
from headway.text.parsers.tool_calls import (
    NoToolParser,
    PythonicParser,
    TaggedJsonParser,
    ToolParser,
)
from headway.text.parsers.xml_calls import XmlParser

# What a chat template writes where it teaches the format or repeats earlier calls. The first that is found counts.
_TOOL_MARKS = (
    ("<TOOLCALL>", "nemotron_json"),
    ("<function=", "qwen3_coder"),
    ("<|tool_call|>", "granite"),
    ("<tool_call>", "hermes"),
    ("[func_name1(", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary of argument name', "llama3_json"),
)
_REASONING_MARKS = (("thought process", "granite"), ("<response>", "granite"), ("</think>", "think"))
_REASONING_TAGS = {"think": THINK, "granite": GRANITE}
_TOOL_TAGS = {
    "nemotron_json": ("<TOOLCALL>", "</TOOLCALL>"),
    "qwen3_coder": ("<tool_call>", "</tool_call>"),
    "granite": ("<|tool_call|>", "<tool_call>"),
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3_json": ("<|python_tag|>",),
    "pythonic": (),
}


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How one model writes tool calls and reasoning; None: not at all, or nobody knows."""

    tools: str | None
    reasoning: str | None

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag that a parser must see: where one is a special token, special tokens may not be left out."""
        reasoning = _REASONING_TAGS.get(self.reasoning or "")
        found = [*_TOOL_TAGS.get(self.tools or "", ())]
        return (*found, *(reasoning.starts + reasoning.ends if reasoning else ()))

    def parser(self, prompt: str, tools: Sequence[Mapping[str, Any]] | None) -> OutputParser:
        """For one answer to `prompt`. tools: the functions on offer, or None where no call is wanted."""
        tags = _REASONING_TAGS.get(self.reasoning or "")
        return OutputParser(tags, prompt, self._tool_parser(tools))

    def _tool_parser(self, tools: Sequence[Mapping[str, Any]] | None) -> ToolParser:
        if tools is None or self.tools is None:
            return NoToolParser()
        if self.tools == "qwen3_coder":
            return XmlParser(_property_types(tools))
        if self.tools == "pythonic":
            return PythonicParser()
        if self.tools == "granite":
            return TaggedJsonParser(_TOOL_TAGS["granite"], None)
        if self.tools == "llama3_json":
            return TaggedJsonParser(_TOOL_TAGS["llama3_json"], None, bare_starts="{")
        open_tag, close_tag = _TOOL_TAGS[self.tools]
        return TaggedJsonParser((open_tag,), close_tag)


class OutputParser:
    """One answer: reasoning first, then content and tool calls. `push` as text comes, `finish` once."""

    def __init__(self, tags: ReasoningTags | None, prompt: str, tool_parser: ToolParser) -> None:
        self._reasoning = None
        if tags is not None:
            self._reasoning = ReasoningParser(tags, is_open=tags.is_open_after(prompt[-200:]))
        self._tools = tool_parser

    def push(self, text: str) -> list[Piece]:
        first = [Content(text)] if self._reasoning is None else self._reasoning.push(text)
        return joined(self._through_tools(first))

    def finish(self) -> list[Piece]:
        first = [] if self._reasoning is None else self._reasoning.finish()
        return joined(self._through_tools(first) + self._tools.finish())

    def _through_tools(self, pieces: Sequence[Piece]) -> list[Piece]:
        found: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Reasoning):
                found.append(piece)
            elif isinstance(piece, Content) and piece.text:
                found += self._tools.push(piece.text)
        return found


def forced_calls_parser() -> OutputParser:
    """For an answer that a grammar holds to a list of calls: no tags, no reasoning."""
    return OutputParser(None, "", TaggedJsonParser((), None, bare_starts="[{"))


def detect_format(template: str, *, tools: str = "auto", reasoning: str = "auto") -> OutputFormat:
    """By the chat template's source, but for what is named; "none" switches a parser off."""
    return OutputFormat(_chosen(tools, template, _TOOL_MARKS), _chosen(reasoning, template, _REASONING_MARKS))


def _chosen(name: str, template: str, marks: Sequence[tuple[str, str]]) -> str | None:
    if name != "auto":
        return None if name == "none" else name
    return next((found for mark, found in marks if mark in template), None)


def _property_types(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Function -> parameter -> JSON type, as far as the schemas say one."""
    found: dict[str, dict[str, str]] = {}
    for tool in tools:
        function = tool.get("function") or {}
        properties = (function.get("parameters") or {}).get("properties")
        types = found.setdefault(str(function.get("name")), {})
        for name, schema in properties.items() if isinstance(properties, dict) else ():
            kind = schema.get("type", "any") if isinstance(schema, dict) else "any"
            types[name] = kind if isinstance(kind, str) else "any"
    return found
