"""What one rendering of a template may cost: processor time, characters, items. What makes much of little asks here."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

import jinja2

MAX_RENDERED_CHARS = 16 * 1024 * 1024
MAX_BUILT_CHARS = 16 * MAX_RENDERED_CHARS  # in all, on the way to the prompt
MAX_ITEMS = 256 * 1024  # of a value with all that it holds; a body has at most 200,000
SMALL_CHARS = 256  # a text so short is not counted: how many can be made is bounded by time
MAX_REPEATS = 64 * 1024  # characters or items that one `*` may make
BASE_CPU_S, MESSAGE_CPU_S = 0.1, 0.001
_NAME = " render budget"  # among a template's variables, where no template can spell it


class RenderLimitError(jinja2.TemplateRuntimeError):
    """A template asked for more text or more work than a prompt can need."""


class RenderBudget:
    """Of one rendering, on one thread.

    Args:
        num_messages: of the conversation, each of which adds to the time.
    """

    def __init__(self, num_messages: int) -> None:
        self._cpu_s = BASE_CPU_S + MESSAGE_CPU_S * num_messages
        self._deadline_s = time.thread_time() + self._cpu_s
        self._earliest_s = time.perf_counter() + self._cpu_s  # a thread's time is no faster, and dear to read
        self._num_chars_left = MAX_BUILT_CHARS

    @classmethod
    def of(cls, context: jinja2.runtime.Context) -> RenderBudget:
        budget = context.parent[_NAME]
        assert isinstance(budget, cls)
        return budget

    def variables(self) -> dict[str, object]:
        return {_NAME: self}

    def check_time(self) -> None:
        if time.perf_counter() > self._earliest_s and time.thread_time() > self._deadline_s:
            raise RenderLimitError(f"the template takes more than {self._cpu_s:.2g} s of processor time")

    def build(self, num_chars: int) -> None:
        """Before so many characters are made."""
        self._num_chars_left -= num_chars
        if num_chars > MAX_RENDERED_CHARS or self._num_chars_left < 0:
            raise RenderLimitError(
                f"the template makes more than {MAX_RENDERED_CHARS} characters at once, or {MAX_BUILT_CHARS} in all"
            )

    def items(self, iterable: Iterable[object]) -> Iterator[object]:
        for item in iterable:
            self.check_time()
            yield item


def num_chars_of(value: object) -> int:
    """At least what `value` takes as text. Raises RenderLimitError where it holds more than MAX_ITEMS."""
    if isinstance(value, str):
        return len(value)
    num_chars = num_items = 0
    held = [value]
    while held:
        one = held.pop()
        if isinstance(one, Mapping):
            held += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            held += one
        num_chars += len(one) if isinstance(one, str) else 8
        num_items += 1
        if num_items + len(held) > MAX_ITEMS:
            raise RenderLimitError(f"a value holds more than {MAX_ITEMS} items")
    return num_chars
