"""Tool calls as Qwen 3 Coder and Nemotron 3 write them:

    <tool_call><function=name><parameter=key>value</parameter></function></tool_call>

The outer tags may be missing, and so may </function> before </tool_call>.
"""

from __future__ import annotations

import json

from headway.text.parsers.pieces import Content, Piece, ToolArguments, ToolStart
from headway.text.parsers.scanner import TrimmedText, cut_at_tag

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
FUNCTION_START, FUNCTION_END = "<function=", "</function>"
PARAMETER_START, PARAMETER_END = "<parameter=", "</parameter>"

# What is being read -> the tags that end it. After an outer tag only white space may come before the next one.
_TAGS = {
    "content": (CALL_START, FUNCTION_START),
    "function": (">",),
    "between": (PARAMETER_START, FUNCTION_END, CALL_END),
    "parameter": (">",),
    "value": (PARAMETER_END,),
}
_NEXT_TAG = {"opened": FUNCTION_START, "closed": CALL_END}


class XmlParser:
    """Values are text; where the function's schema wants something else they are read as JSON.

    Args:
        property_types: function name -> parameter name -> the type that its JSON schema says.
    """

    def __init__(self, property_types: dict[str, dict[str, str]]) -> None:
        self._property_types = property_types
        self._content = TrimmedText(drops_leading=False)
        self._buffer = ""
        self._place = "content"  # or another key of _TAGS or _NEXT_TAG
        self._opening = ""  # tags of what is no call yet
        self._num_calls = 0
        self._num_parameters = 0
        self._function = ""
        self._parameter = ""

    def push(self, text: str) -> list[Piece]:
        self._buffer += text
        return self._read(is_last=False)

    def finish(self) -> list[Piece]:
        pieces = self._read(is_last=True)
        if self._place == "function":
            pieces.append(Content(self._content.restore() + self._opening + self._buffer))
        elif self._place == "value":
            pieces.append(self._argument(json.dumps(self._buffer, ensure_ascii=False)[:-1]))
        elif self._place == "content" and not self._num_calls:
            pieces.append(Content(self._content.flush()))
        return pieces

    def _read(self, *, is_last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        is_moving = True
        while is_moving:
            step = self._look_for_next if self._place in _NEXT_TAG else self._read_on
            is_moving = step(pieces, is_last=is_last)
        return pieces

    def _look_for_next(self, pieces: list[Piece], *, is_last: bool) -> bool:
        """Between two outer tags; False while the second may yet come."""
        tag, rest = _NEXT_TAG[self._place], self._buffer.lstrip()
        if rest.startswith(tag):
            if self._place == "opened":
                self._opening += self._buffer[: len(self._buffer) - len(rest)] + tag
            self._buffer = rest[len(tag) :]
            self._place = "function" if self._place == "opened" else "content"
        elif tag.startswith(rest) and not is_last:
            return False
        else:
            if self._place == "opened":  # and is none
                pieces.append(Content(self._content.push(self._content.restore() + self._opening)))
            self._place = "content"
        return True

    def _read_on(self, pieces: list[Piece], *, is_last: bool) -> bool:
        cut = cut_at_tag(self._buffer, _TAGS[self._place], is_last=is_last)
        if self._place == "content":
            pieces.append(Content(self._content.push(cut.before)))
            self._buffer = cut.rest
        if cut.tag is None:
            return False
        self._buffer = cut.rest
        self._step(cut.before, cut.tag, pieces)
        return True

    def _step(self, before: str, tag: str, pieces: list[Piece]) -> None:
        if self._place == "content":
            self._content.drop()
            self._opening = tag
            self._place = "opened" if tag == CALL_START else "function"
        elif self._place == "function":
            self._begin_call(before.strip(), pieces)
        elif self._place == "between" and tag == PARAMETER_START:
            self._place = "parameter"
        elif self._place == "between":
            pieces.append(ToolArguments(self._num_calls - 1, "}" if self._num_parameters else "{}"))
            self._place = "closed" if tag == FUNCTION_END else "content"
        elif self._place == "parameter":
            self._parameter, self._place = before.strip(), "value"
        else:
            pieces.append(self._argument(self._as_json(before.removeprefix("\n").removesuffix("\n"))))
            self._place = "between"

    def _begin_call(self, name: str, pieces: list[Piece]) -> None:
        self._function, self._place, self._num_parameters = name, "between", 0
        pieces.append(ToolStart(self._num_calls, name))
        self._num_calls += 1

    def _argument(self, value_json: str) -> Piece:
        opening = ", " if self._num_parameters else "{"
        key = json.dumps(self._parameter, ensure_ascii=False)
        self._num_parameters += 1
        return ToolArguments(self._num_calls - 1, f"{opening}{key}: {value_json}")

    def _as_json(self, value: str) -> str:
        kind = self._property_types.get(self._function, {}).get(self._parameter, "string")
        if kind != "string":
            try:
                return json.dumps(json.loads(value), ensure_ascii=False, allow_nan=False)
            except (ValueError, RecursionError):
                pass
        return json.dumps(value, ensure_ascii=False)
