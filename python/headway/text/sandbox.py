"""A Jinja environment for templates nobody vouches for: no attribute tricks, no unbounded loops, no huge results.

Jinja's immutable sandbox keeps a template away from Python's internals. What it leaves open is work without end, so
the operators and helpers that make much out of little in one go are bounded here as well. It is no limit on memory: a
template that doubles a string step by step is only stopped by the size of the result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

MAX_RENDERED_CHARS = 16 * 1024 * 1024
MAX_RANGE = 10_000  # items of one range(), and the total of all in one rendering is bounded by MAX_LOOP_ITEMS
MAX_LOOP_ITEMS = 1_000_000
_MAX_REPEATED = 1024 * 1024  # characters or items that one `*`, padding or format may make


class RenderLimitError(jinja2.TemplateRuntimeError):
    """A template asked for more text or more work than a prompt can need."""


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace() with plain names only."""

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with an underscore")
        super().__setitem__(name, value)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what training scores; for a prompt it is its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares an instance variable

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class SandboxEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """What chat templates expect (tojson, raise_exception, strftime_now, break and continue) and no more."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        self.filters.update(
            tojson=_tojson, center=_bounded_center, indent=_bounded_indent, format=_bounded_format
        )
        self.globals = {
            "dict": _new_dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: object, right: object
    ) -> object:
        if operator == "*":
            _check_repeat(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif isinstance(left, str):
            _check_pattern(left)
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also bars the string methods that pad to a width of the template's choice."""
        if isinstance(obj, str) and attr in {"center", "ljust", "rjust", "zfill", "expandtabs"}:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format, as Jinja guards it, of patterns without wide fields."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_pattern(value.__self__)
        return wrapped


def render_within_limits(template: jinja2.Template, variables: Mapping[str, object]) -> str:
    """Renders piece by piece and stops at MAX_RENDERED_CHARS. Raises RenderLimitError or a jinja2.TemplateError."""
    pieces: list[str] = []
    num_chars = 0
    for piece in template.generate({**variables, "range": _LoopBudget().range}):
        num_chars += len(piece)
        if num_chars > MAX_RENDERED_CHARS:
            raise RenderLimitError(f"the rendered prompt exceeds {MAX_RENDERED_CHARS} characters")
        pieces.append(piece)
    return "".join(pieces)


class _LoopBudget:
    """range() of one rendering: nested loops share a total."""

    def __init__(self) -> None:
        self._num_left = MAX_LOOP_ITEMS

    def range(self, *bounds: int) -> range:
        items = range(*bounds)
        self._num_left -= len(items) if len(items) <= MAX_RANGE else MAX_LOOP_ITEMS + 1
        if self._num_left < 0:
            raise RenderLimitError(f"range() gives at most {MAX_RANGE} items, {MAX_LOOP_ITEMS} in all")
        return items


def _check_repeat(left: object, right: object) -> None:
    for sequence, count in ((left, right), (right, left)):
        if not isinstance(sequence, (str, list, tuple)) or not isinstance(count, int):
            continue
        if len(sequence) * count > _MAX_REPEATED:
            raise RenderLimitError(f"a repetition exceeds {_MAX_REPEATED} items")


def _check_power(left: object, right: object) -> None:
    is_small = isinstance(right, (int, float)) and abs(right) <= 64
    if not (is_small and isinstance(left, (int, float)) and abs(left) <= 2**64):
        raise RenderLimitError("a power takes numbers up to 2**64 and exponents up to 64")


def _check_width(width: int) -> int:
    if width > 1024:
        raise RenderLimitError(f"a width of {width} exceeds 1024")
    return width


def _bounded_center(value: object, width: int = 80) -> str:
    return str(value).center(_check_width(width))


def _check_pattern(pattern: str) -> None:
    """Refuses widths of five digits and widths that arguments set: "%*d", "{:{}}"."""
    if re.search(r"\d{5}|%[^a-zA-Z%]*\*|\{[^}]*\{", pattern):
        raise RenderLimitError(f"the format {pattern[:80]!r} may make a field too wide")


def _bounded_format(value: object, *args: object, **kwargs: object) -> str:
    pattern = str(value)
    _check_pattern(pattern)
    return pattern % (kwargs or args)


def _bounded_indent(value: object, width: int = 4, first: bool = False, blank: bool = False) -> str:
    pad = " " * _check_width(width)
    lines = str(value).split("\n")
    if len(lines) * len(pad) > _MAX_REPEATED:
        raise RenderLimitError(f"an indentation exceeds {_MAX_REPEATED} characters")
    return "\n".join(_indented(lines, pad, first, blank))


def _indented(lines: list[str], pad: str, first: bool, blank: bool) -> Iterator[str]:
    for i, line in enumerate(lines):
        yield pad + line if (i > 0 or first) and (line or blank) else line


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a model never saw."""
    if indent is not None:
        _check_width(indent)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _new_dict(*args: object, **kwargs: object) -> dict[object, object]:
    items: dict[object, object] = dict(*args)
    return items | kwargs


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    """Templates date their system prompt with it."""
    _check_width(len(pattern))
    return datetime.now().strftime(pattern)
