"""Reads tool calls written as JSON objects, `{"name": ..., "arguments": {...}}`, while they are being written.

One after another, with commas, semicolons, brackets or nothing between them, as the formats have it. A character is
looked at once, and what is returned does not depend on how the text was cut. Arguments are passed on as they stand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from headway.text.parsers.pieces import Piece, ToolArguments, ToolStart

NAME_KEYS = ("name",)
ARGUMENT_KEYS = ("arguments", "parameters")
MAX_NAME_CHARS = 256
_BETWEEN = frozenset(" \t\r\n,;[]")


@dataclass(slots=True)
class _Object:
    """The call being read. Depth 1 is inside its braces, more is inside a value."""

    text: list[str] = field(default_factory=list)
    depth: int = 0
    is_string: bool = False
    is_escaped: bool = False
    key: str | None = None  # of the value that is being read
    token: list[str] = field(default_factory=list)  # the string or the value that is being read
    is_value: bool = False  # after the colon
    name: str | None = None
    is_open: bool = False  # told of with a ToolStart
    has_arguments: bool = False
    waiting_arguments: list[str] = field(default_factory=list)  # arguments that came before the name


class JsonCallReader:
    """`push` text between tags; `failed` is set, with the text in `rest`, where no call can be made of it."""

    def __init__(self, first_index: int) -> None:
        self.next_index = first_index
        self.failed = False
        self._object: _Object | None = None
        self._between: list[str] = []  # what came since the last call
        self._failed_text: list[str] = []
        self._pieces: list[Piece] = []

    @property
    def is_between(self) -> bool:
        """No object is open."""
        return self._object is None and not self.failed

    def push(self, text: str) -> list[Piece]:
        self._pieces = []
        for char in text:
            self._push(char)
        return self._pieces

    def take_rest(self) -> str:
        """Text that became no call: from the object that is no call, or was never finished without having a name."""
        rest = "".join(self._failed_text)
        if self._object is not None and not self._object.is_open:
            rest = "".join(self._object.text) + rest
        self._failed_text = []
        return rest

    def _push(self, char: str) -> None:
        if self.failed:
            self._failed_text.append(char)
        elif self._object is not None:
            self._object.text.append(char)
            self._read(self._object, char)
        elif char == "{":
            self._object = _Object(text=[*self._between, "{"], depth=1)
            self._between = []
        elif char in _BETWEEN:
            self._between.append(char)
        else:
            self.failed = True
            self._failed_text = [*self._between, char]

    def _read(self, call: _Object, char: str) -> None:
        if call.is_string:
            self._read_string(call, char)
        elif char == '"':
            call.is_string = True
            self._take(call, char)
        elif char in "{[":
            call.depth += 1
            self._take(call, char)
        elif char in "}]":
            self._close(call, char)
        elif call.depth == 1 and char == ":" and not call.is_value:
            self._begin_value(call)
        elif call.depth == 1 and char == ",":
            self._end_value(call)
        elif call.depth > 1 or not char.isspace():
            self._take(call, char)

    def _read_string(self, call: _Object, char: str) -> None:
        self._take(call, char)
        if call.is_escaped:
            call.is_escaped = False
        elif char == "\\":
            call.is_escaped = True
        elif char == '"':
            call.is_string = False

    def _close(self, call: _Object, char: str) -> None:
        call.depth -= 1
        if call.depth > 0:
            self._take(call, char)
            return
        self._end_value(call)
        if call.name is None or char != "}":
            self._fail(call)
            return
        if not call.has_arguments:
            self._emit_arguments(call, "{}")
        self._object = None

    def _begin_value(self, call: _Object) -> None:
        call.key = _string("".join(call.token))
        call.token = []
        call.is_value = True

    def _end_value(self, call: _Object) -> None:
        if call.is_value and call.key in NAME_KEYS and call.name is None:
            name = _string("".join(call.token))
            if name and len(name) <= MAX_NAME_CHARS:
                self._start(call, name)
        call.key, call.token, call.is_value = None, [], False

    def _take(self, call: _Object, char: str) -> None:
        """A character of a key or value: arguments go out at once, the rest is kept until it is complete."""
        if call.is_value and call.key in ARGUMENT_KEYS:
            self._emit_arguments(call, char)
        else:
            call.token.append(char)

    def _emit_arguments(self, call: _Object, text: str) -> None:
        call.has_arguments = True
        if call.is_open:
            self._pieces.append(ToolArguments(self.next_index - 1, text))
        else:
            call.waiting_arguments.append(text)

    def _start(self, call: _Object, name: str) -> None:
        call.name, call.is_open = name, True
        self._pieces.append(ToolStart(self.next_index, name))
        self.next_index += 1
        if call.waiting_arguments:
            self._emit_arguments(call, "".join(call.waiting_arguments))

    def _fail(self, call: _Object) -> None:
        self.failed = True
        self._failed_text.extend(call.text)
        self._object = None


def _string(text: str) -> str | None:
    """A JSON string's value; None for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
