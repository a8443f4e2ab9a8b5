"""Tool calls in a model's output, by format. Each parser takes text in pieces of any size and returns what it found.

Text that was to be a call and is none comes out as content, with its tags. What is left out is the tags of calls and
the white space around them.
"""

from __future__ import annotations

import ast
import json
from typing import Protocol

from headway.text.parsers.json_calls import JsonCallReader
from headway.text.parsers.pieces import Content, Piece, ToolArguments, ToolStart
from headway.text.parsers.scanner import TrimmedText, cut_at_tag

MAX_PYTHONIC_CHARS = 2**16


class ToolParser(Protocol):
    """What every format offers."""

    def push(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]:
        """The end of the output: what was held back."""
        ...


class NoToolParser:
    """All is content."""

    def push(self, text: str) -> list[Piece]:
        return [Content(text)]

    def finish(self) -> list[Piece]:
        return []


class TaggedJsonParser:
    """JSON calls after an opening tag: Hermes and Qwen, Nemotron Nano 2, Granite, Llama 3.

    Args:
        open_tags: any of them begins a stretch of calls.
        close_tag: ends it; None: only the end of the output does.
        bare_starts: an output whose first character is one of these begins a stretch without a tag.
    """

    def __init__(self, open_tags: tuple[str, ...], close_tag: str | None, *, bare_starts: str = "") -> None:
        self._open_tags = open_tags
        self._close_tag = close_tag
        self._bare_starts = bare_starts  # empty once that is decided
        self._content = TrimmedText(drops_leading=False)
        self._leading = ""  # white space before what may be a bare call
        self._buffer = ""
        self._tag = ""  # the one that opened
        self._reader: JsonCallReader | None = None
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        self._buffer += text
        return self._read(is_last=False)

    def finish(self) -> list[Piece]:
        pieces = self._read(is_last=True)
        if self._reader is not None:
            pieces += self._close("")
        elif not self._num_calls:
            pieces.append(Content(self._leading + self._content.flush()))
        return pieces

    def _read(self, *, is_last: bool) -> list[Piece]:
        pieces: list[Piece] = []
        if self._bare_starts and not self._begin_bare(is_last=is_last):
            return pieces
        is_moving = True
        while is_moving:
            reader = self._reader
            is_moving = (
                self._read_outside(pieces, is_last=is_last)
                if reader is None
                else self._read_inside(reader, pieces, is_last=is_last)
            )
        return pieces

    def _begin_bare(self, *, is_last: bool) -> bool:
        """Decides by the first character that is no white space; False while there is none."""
        stripped = self._buffer.lstrip()
        if not stripped and not is_last:
            return False
        starts, self._bare_starts = self._bare_starts, ""
        if stripped.startswith(tuple(starts)):
            self._leading = self._buffer[: len(self._buffer) - len(stripped)]
            self._buffer = stripped
            self._open("")
        return True

    def _open(self, tag: str) -> None:
        self._tag = tag
        self._reader = JsonCallReader(self._num_calls)

    def _read_outside(self, pieces: list[Piece], *, is_last: bool) -> bool:
        cut = cut_at_tag(self._buffer, self._open_tags, is_last=is_last)
        pieces.append(Content(self._content.push(cut.before)))
        self._buffer = cut.rest
        if cut.tag is None:
            return False
        self._content.drop()
        self._open(cut.tag)
        return True

    def _read_inside(self, reader: JsonCallReader, pieces: list[Piece], *, is_last: bool) -> bool:
        """A closing tag within a call's string belongs to the string."""
        tags = () if self._close_tag is None else (self._close_tag,)
        cut = cut_at_tag(self._buffer, tags, is_last=is_last)
        pieces += reader.push(cut.before)
        self._buffer = cut.rest
        if cut.tag is None:
            return False
        if reader.is_between or reader.failed:
            pieces += self._close(cut.tag)
        else:
            pieces += reader.push(cut.tag)
        return True

    def _close(self, tag: str) -> list[Piece]:
        assert self._reader is not None
        rest = self._reader.take_rest()
        has_calls = self._reader.next_index > self._num_calls
        self._num_calls = self._reader.next_index
        self._reader = None
        leading, self._leading = self._leading, ""
        if not rest:  # an empty list of calls parts the words around it
            return [] if has_calls else [Content(self._content.restore())]
        return [Content(self._content.restore() + leading + self._tag + rest + tag)]


class PythonicParser:
    """Llama 3.2 and 4: the whole output is a Python list of calls, `[f(a=1), g(b="x")]`. Read when it is complete."""

    def __init__(self) -> None:
        self._text = ""
        self._is_content = False

    def push(self, text: str) -> list[Piece]:
        if self._is_content:
            return [Content(text)]
        self._text += text
        stripped = self._text.lstrip()
        if stripped and (stripped[0] != "[" or len(self._text) > MAX_PYTHONIC_CHARS):
            self._is_content = True
            return [Content(self._text)]
        return []

    def finish(self) -> list[Piece]:
        if self._is_content:
            return []
        return _pythonic_calls(self._text.strip()) or [Content(self._text)]


def _json(value: object) -> str:
    """Raises ValueError for numbers that JSON does not have."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _pythonic_calls(text: str) -> list[Piece]:
    """Parsed, never run. Empty where the text is anything but a list of calls with literal keywords."""
    try:
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return []
        pieces: list[Piece] = []
        for index, call in enumerate(tree.elts):
            if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
                return []
            arguments = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords if word.arg}
            pieces.append(ToolStart(index, call.func.id))
            pieces.append(ToolArguments(index, _json(arguments)))
        return pieces
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []
