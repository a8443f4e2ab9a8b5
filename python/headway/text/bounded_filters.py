"""Operators and filters of templates that count what they would make before they make it. Knows no environment."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jinja2
import jinja2.filters
import jinja2.runtime

from headway.text.render_budget import MAX_REPEATS, SMALL_CHARS, RenderBudget, RenderLimitError, num_chars_of

MAX_PARTS = 10_000  # of one range(), batch() or slice()
MAX_INT_BITS = 4096
MAX_WIDTH = 1024


def bounded_range(*bounds: int) -> range:
    items = range(*bounds)
    if len(items) > MAX_PARTS:
        raise RenderLimitError(f"range() gives at most {MAX_PARTS} items")
    return items


def check_repeat(context: jinja2.runtime.Context, left: object, right: object) -> None:
    if isinstance(left, int) and isinstance(right, int) and _num_bits(left, right) > MAX_INT_BITS:
        raise RenderLimitError(f"a product has more than {MAX_INT_BITS} bits")
    for sequence, count in ((left, right), (right, left)):
        if not isinstance(sequence, (str, list, tuple)) or not isinstance(count, int):
            continue
        if len(sequence) * count > MAX_REPEATS:
            raise RenderLimitError(f"a repetition exceeds {MAX_REPEATS} items")
        RenderBudget.of(context).build(max(0, count) * num_chars_of(sequence))


def _num_bits(*numbers: int) -> int:
    return sum(number.bit_length() for number in numbers)


def check_power(left: object, right: object) -> None:
    is_small = isinstance(right, (int, float)) and abs(right) <= 64
    if not (is_small and isinstance(left, (int, float)) and abs(left) <= 2**64):
        raise RenderLimitError("a power takes numbers up to 2**64 and exponents up to 64")


def check_sum(context: jinja2.runtime.Context, left: object, right: object) -> None:
    if isinstance(left, str) and isinstance(right, str) and len(left) + len(right) <= SMALL_CHARS:
        return
    if isinstance(left, (str, list, tuple)):
        RenderBudget.of(context).build(num_chars_of(left) + num_chars_of(right))


def check_width(width: int) -> int:
    if width > MAX_WIDTH:
        raise RenderLimitError(f"a width of {width} exceeds {MAX_WIDTH}")
    return width


def check_pattern(context: jinja2.runtime.Context, pattern: str, arguments: Sequence[object]) -> None:
    """Refuses widths of five digits, widths that arguments set ("%*d", "{:{}}"), and long arguments written often."""
    if re.search(r"\d{5}|%[^a-zA-Z%]*\*|\{[^}]*\{", pattern):
        raise RenderLimitError(f"the format {pattern[:80]!r} may make a field too wide")
    num_fields = pattern.count("%") + pattern.count("{")
    RenderBudget.of(context).build(len(pattern) + num_fields * num_chars_of(arguments))


def _bounded_center(value: object, width: int = 80) -> str:
    return str(value).center(check_width(width))


@jinja2.pass_context
def _bounded_format(context: jinja2.runtime.Context, value: object, *args: object, **kwargs: object) -> str:
    pattern = str(value)
    check_pattern(context, pattern, (*args, kwargs))
    return pattern % (kwargs or args)


def _bounded_indent(value: object, width: int = 4, first: bool = False, blank: bool = False) -> str:
    pad = " " * check_width(width)
    lines = str(value).split("\n")
    if len(lines) * len(pad) > MAX_REPEATS * 16:
        raise RenderLimitError(f"an indentation exceeds {MAX_REPEATS * 16} characters")
    return "\n".join(_indented(lines, pad, first, blank))


def _indented(lines: list[str], pad: str, first: bool, blank: bool) -> Iterator[str]:
    for i, line in enumerate(lines):
        yield pad + line if (i > 0 or first) and (line or blank) else line


@jinja2.pass_context
def bounded_join(
    context: jinja2.runtime.Context, values: Iterable[object], d: str = "", attribute: str | int | None = None
) -> str:
    if attribute is not None:
        values = map(jinja2.filters.make_attrgetter(context.environment, attribute), values)
    items, budget = list(values), RenderBudget.of(context)
    budget.build(sum(num_chars_of(item) for item in items) + len(str(d)) * len(items))
    return str(d).join(map(str, items))


@jinja2.pass_context
def bounded_replace(
    context: jinja2.runtime.Context, s: object, old: object, new: object, count: int | None = None
) -> str:
    text, before, after = str(s), str(old), str(new)
    limit = -1 if count is None else count
    num_found = text.count(before) if limit < 0 else min(limit, text.count(before))
    RenderBudget.of(context).build(len(text) + num_found * len(after))
    return text.replace(before, after, limit)


@jinja2.pass_context
def _bounded_string(context: jinja2.runtime.Context, value: object) -> str:
    RenderBudget.of(context).build(num_chars_of(value))
    return str(value)


def _bounded_round(value: float, precision: int = 0, method: Any = "common") -> float:
    return jinja2.filters.do_round(value, check_width(abs(precision)) and precision, method)


def _bounded_batch(value: Iterable[object], linecount: int, fill_with: object = None) -> Iterator[object]:
    return jinja2.filters.do_batch(value, _check_parts(linecount), fill_with)


def _bounded_slice(value: Any, slices: int, fill_with: object = None) -> Iterator[object]:
    return jinja2.filters.sync_do_slice(value, _check_parts(slices), fill_with)


def _check_parts(number: int) -> int:
    if number > MAX_PARTS:
        raise RenderLimitError(f"at most {MAX_PARTS} parts can be made")
    return number


def _bounded_sum(values: Iterable[float], attribute: str | int | None = None, start: float = 0) -> float:
    """Of numbers: adding up lists takes the square of their number."""
    numbers = list(values)
    if attribute is not None or not all(isinstance(value, (int, float)) for value in [*numbers, start]):
        raise RenderLimitError("sum takes numbers")
    return start + sum(numbers)


@jinja2.pass_context
def _bounded_json(
    context: jinja2.runtime.Context,
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a model never saw."""
    if indent is not None:
        check_width(indent)
    RenderBudget.of(context).build(num_chars_of(value))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


BOUNDED_FILTERS: dict[str, Callable[..., Any]] = {
    "batch": _bounded_batch,
    "center": _bounded_center,
    "format": _bounded_format,
    "indent": _bounded_indent,
    "join": bounded_join,
    "replace": bounded_replace,
    "round": _bounded_round,
    "slice": _bounded_slice,
    "string": _bounded_string,
    "sum": _bounded_sum,
    "tojson": _bounded_json,
}
