"""Finds tags in text that comes in pieces of any size, with the same result however it was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cut:
    """`before` is final text. `tag` is the tag after it, or None; `rest` follows the tag, or may yet become one."""

    before: str
    tag: str | None
    rest: str


def cut_at_tag(text: str, tags: Sequence[str], *, is_last: bool) -> Cut:
    """Cuts at the first of the tags. No tag may be the beginning of another."""
    starts = [(start, tag) for tag in tags if (start := text.find(tag)) >= 0]
    if starts:
        start, tag = min(starts)
        return Cut(text[:start], tag, text[start + len(tag) :])
    num_held = 0 if is_last else max((_num_begun(text, tag) for tag in tags), default=0)
    end = len(text) - num_held
    return Cut(text[:end], None, text[end:])


def _num_begun(text: str, tag: str) -> int:
    """Characters at the end of text that are the beginning of tag."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[len(text) - length :]):
            return length
    return 0


class TrimmedText:
    """Passes text on, but holds white space at its end back: before a tag it belongs to the tag.

    `drops_leading`: white space before anything else is dropped too.
    """

    def __init__(self, *, drops_leading: bool) -> None:
        self._drops_leading = drops_leading
        self._held = ""
        self._dropped = ""

    def push(self, text: str) -> str:
        text = self._held + text
        if self._drops_leading:
            text = text.lstrip()
            if not text:
                self._held = ""
                return ""
            self._drops_leading = False
        shown = text.rstrip()
        self._held = text[len(shown) :]
        return shown

    def drop(self) -> None:
        """A tag follows: what is held goes, and so does white space after the tag."""
        self._dropped, self._held = self._held, ""
        self._drops_leading = True

    def restore(self) -> str:
        """The tag was none: what was dropped before it, and nothing is dropped after it."""
        self._drops_leading = False
        return self._dropped

    def flush(self) -> str:
        """The end of the text: what is held belongs to it."""
        held, self._held = self._held, ""
        return held
