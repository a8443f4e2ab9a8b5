"""A Jinja environment for templates nobody vouches for: no attribute tricks, no unbounded loops, no huge results.

Jinja's immutable sandbox keeps a template away from Python's internals. What it leaves open is work without end: here
time is looked at in every turn of a loop and every call, and what operators, filters and methods would make of little
is counted before it is made (`headway.text.render_budget`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from headway.text.bounded_filters import (
    BOUNDED_FILTERS,
    bounded_join,
    bounded_range,
    bounded_replace,
    check_pattern,
    check_power,
    check_repeat,
    check_sum,
    check_width,
)
from headway.text.render_budget import (
    MAX_RENDERED_CHARS,
    SMALL_CHARS,
    RenderBudget,
    RenderLimitError,
    num_chars_of,
)
from headway.text.template_code import CountingCodeGenerator

_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_BYTE_METHODS = frozenset({"encode", "to_bytes"})  # what bytes can do is bounded by nothing here


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


@jinja2.pass_context
def counted_output(context: jinja2.runtime.Context, value: object) -> object:
    """What `{{ value }}` writes, be it to the prompt or into a macro's result."""
    if not isinstance(value, str) or len(value) > SMALL_CHARS:
        RenderBudget.of(context).build(num_chars_of(value))
    return value


class SandboxEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """What chat templates expect (tojson, raise_exception, strftime_now, break and continue) and no more."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})
    code_generator_class = CountingCodeGenerator

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
            finalize=counted_output,
        )
        self.filters.update(BOUNDED_FILTERS)
        self.globals = {
            "dict": _new_dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "range": bounded_range,
            "strftime_now": _strftime_now,
        }

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call of a template, its own macros among them."""
        budget = RenderBudget.of(__context)
        budget.check_time()
        if isinstance(__obj, jinja2.runtime.Macro) and (__obj.catch_varargs or __obj.catch_kwargs):
            num_chars_of((args, kwargs))  # which become a new tuple or dictionary
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and __obj.__name__ in ("join", "replace"):
            bounded = bounded_join if __obj.__name__ == "join" else bounded_replace
            text = (*args, owner) if __obj.__name__ == "join" else (owner, *args)
            return bounded(__context, *text, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: object, right: object
    ) -> object:
        if operator == "*":
            check_repeat(context, left, right)
        elif operator == "**":
            check_power(left, right)
        elif operator == "+":
            check_sum(context, left, right)
        elif isinstance(left, str):
            check_pattern(context, left, (right,))
        return super().call_binop(context, operator, left, right)

    # --- called by the code of templates: headway.text.template_code

    @staticmethod
    @jinja2.pass_context
    def counted_items(context: jinja2.runtime.Context, iterable: Iterable[object]) -> Iterator[object]:
        """What a loop runs over; an undefined value is empty."""
        return RenderBudget.of(context).items(iterable)

    @staticmethod
    def counted_text(context: jinja2.runtime.Context, parts: tuple[object, ...]) -> str:
        """What `~` joins."""
        RenderBudget.of(context).build(sum(map(num_chars_of, parts)))
        return "".join(map(str, parts))

    @staticmethod
    def counted_container(container: object) -> object:
        num_chars_of(container)
        return container

    @staticmethod
    def count_text(context: jinja2.runtime.Context, num_chars: int) -> None:
        """Text of the template's own that goes into a macro's result."""
        RenderBudget.of(context).build(num_chars)

    # ---

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also bars the methods that pad to a width of the template's choice, and those that make bytes."""
        if isinstance(obj, (str, int)) and attr in _PADDING_METHODS | _BYTE_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format, as Jinja guards it, of patterns without wide fields."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @jinja2.pass_context
        @wraps(wrapped)
        def bounded(context: jinja2.runtime.Context, *args: object, **kwargs: object) -> str:
            check_pattern(context, value.__self__, (*args, kwargs))
            return wrapped(*args, **kwargs)

        return bounded


def render_within_limits(
    template: jinja2.Template, variables: Mapping[str, object], num_messages: int
) -> str:
    """Raises RenderLimitError or a jinja2.TemplateError."""
    budget = RenderBudget(num_messages)
    pieces: list[str] = []
    num_chars = 0
    for piece in template.generate({**variables, **budget.variables()}):
        num_chars += len(piece)
        if num_chars > MAX_RENDERED_CHARS:
            raise RenderLimitError(f"the rendered prompt exceeds {MAX_RENDERED_CHARS} characters")
        pieces.append(piece)
    return "".join(pieces)


def _new_dict(*args: object, **kwargs: object) -> dict[object, object]:
    items: dict[object, object] = dict(*args)
    return items | kwargs


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    """Templates date their system prompt with it."""
    check_width(len(pattern))
    return datetime.now().strftime(pattern)
