"""What a parser finds in a model's output, piece by piece. Joined in order they are the whole answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text the model wrote for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolStart:
    """A call of a function begins; `index` counts the calls of one answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """More of a call's arguments, JSON as the model writes it."""

    index: int
    text: str


Piece = Content | Reasoning | ToolStart | ToolArguments


def joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece, empty ones left out: what does not depend on how the text was cut."""
    result: list[Piece] = []
    for piece in pieces:
        if not isinstance(piece, ToolStart) and not piece.text:
            continue
        last = result[-1] if result else None
        if isinstance(piece, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + piece.text)
        elif isinstance(piece, Reasoning) and isinstance(last, Reasoning):
            result[-1] = Reasoning(last.text + piece.text)
        elif (
            isinstance(piece, ToolArguments) and isinstance(last, ToolArguments) and piece.index == last.index
        ):
            result[-1] = ToolArguments(last.index, last.text + piece.text)
        else:
            result.append(piece)
    return result
