"""Separates what a model writes for itself from its answer. Text comes in pieces of any size."""

from __future__ import annotations

from dataclasses import dataclass

from headway.text.parsers.pieces import Content, Piece, Reasoning
from headway.text.parsers.scanner import TrimmedText, cut_at_tag


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """Any of `starts` at the beginning of the output opens reasoning, any of `ends` closes it.

    `frame` are a tag before all of the answer and one after it that are no part of it.
    """

    starts: tuple[str, ...]
    ends: tuple[str, ...]
    frame: tuple[str, str] | None = None

    def is_open_after(self, prompt: str) -> bool:
        """Whether the prompt itself has opened reasoning: many templates do."""
        return prompt.rstrip().endswith(self.starts)


THINK = ReasoningTags(("<think>",), ("</think>",))
GRANITE = ReasoningTags(
    ("<think>", "Here is my thought process:", "Here's my thought process:"),
    ("</think>", "Here is my response:", "Here's my response:"),
    frame=("<response>", "</response>"),
)


class ReasoningParser:
    """White space at the seams between reasoning and answer belongs to neither."""

    def __init__(self, tags: ReasoningTags, *, is_open: bool) -> None:
        self._tags = tags
        self._buffer = ""
        self._place = "reasoning" if is_open else "start"  # then frame, then content
        self._trimmed = TrimmedText(drops_leading=is_open)
        self._closing_tag: str | None = None  # of the frame that is open

    def push(self, text: str) -> list[Piece]:
        self._buffer += text
        return self._read(is_last=False)

    def finish(self) -> list[Piece]:
        pieces = self._read(is_last=True)
        held = self._trimmed.flush() if self._place == "content" else ""
        return [*pieces, Content(held)]

    def _read(self, *, is_last: bool) -> list[Piece]:
        if self._place == "start" and not self._start(is_last=is_last):
            return []
        pieces: list[Piece] = []
        if self._place == "reasoning":
            cut = cut_at_tag(self._buffer, self._tags.ends, is_last=is_last)
            self._buffer = cut.rest
            pieces.append(Reasoning(self._trimmed.push(cut.before)))
            if cut.tag is None:
                return pieces
            self._place = "frame"
            self._trimmed.drop()
        if self._place == "frame" and not self._open_frame(is_last=is_last):
            return pieces
        return pieces + self._content(is_last=is_last)

    def _start(self, *, is_last: bool) -> bool:
        """Decides by what the output begins with; False while that is open."""
        begun = self._buffer.lstrip()
        for tag in self._tags.starts:
            if begun.startswith(tag):
                self._place, self._buffer = "reasoning", begun[len(tag) :]
                self._trimmed = TrimmedText(drops_leading=True)
                return True
        if not is_last and any(tag.startswith(begun) for tag in self._tags.starts):
            return False
        self._place = "frame"
        return True

    def _open_frame(self, *, is_last: bool) -> bool:
        """Takes the tag before the answer, if there is one; False while that is open."""
        begun = self._buffer.lstrip()
        if self._tags.frame is not None:
            opening_tag, closing_tag = self._tags.frame
            if begun.startswith(opening_tag):
                self._buffer, self._closing_tag = begun[len(opening_tag) :], closing_tag
                self._trimmed = TrimmedText(drops_leading=True)
            elif opening_tag.startswith(begun) and not is_last:
                return False
        self._place = "content"
        return True

    def _content(self, *, is_last: bool) -> list[Piece]:
        """All that is left but a closing tag at its very end."""
        tags = () if self._closing_tag is None else (self._closing_tag,)
        pieces: list[Piece] = []
        while True:
            cut = cut_at_tag(self._buffer, tags, is_last=is_last)
            pieces.append(Content(self._trimmed.push(cut.before)))
            self._buffer = cut.rest
            if cut.tag is None:
                return pieces
            if not cut.rest.strip():  # the end, as it seems so far
                self._buffer = cut.tag + cut.rest
                if is_last:
                    self._trimmed.drop()
                return pieces
            pieces.append(Content(self._trimmed.push(cut.tag)))
