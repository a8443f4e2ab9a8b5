"""One answer of a chat while it grows: what its text means, what of it is wanted, and how a message says it."""

from __future__ import annotations

from dataclasses import dataclass, field

from headway.outputs import TokenLogprobs
from headway.server.calls import new_id
from headway.server.client import EngineOutput
from headway.server.schemas.chat import (
    AnswerMessage,
    FunctionCall,
    FunctionDelta,
    MessageDelta,
    ToolCall,
    ToolCallDelta,
)
from headway.server.schemas.common import FinishReason
from headway.server.sse import TextEvent
from headway.text.parsers import Content, OutputParser, Piece, Reasoning, ToolArguments, ToolStart, joined


@dataclass(slots=True)
class Answer:
    """One choice so far. What is not told of yet waits in `token_ids` and `logprobs`.

    Attributes:
        max_calls: calls beyond it are left out; None: all are wanted.
        reasoning: all of it, be it shown or not.
        text_event: what its events with text alone are made of.
    """

    parser: OutputParser
    max_calls: int | None
    shows_reasoning: bool
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    num_calls: int = 0
    is_begun: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    text_event: TextEvent | None = None

    def add(self, output: EngineOutput) -> list[Piece]:
        """What the output says, without what nobody wants."""
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or ()
        pieces = self.parser.push(output.text)
        if output.finish_reason is not None:
            pieces = joined(pieces + self.parser.finish())
        pieces = [piece for piece in pieces if self._is_wanted(piece)]
        if output.finish_reason is not None:
            self.stop_reason = output.stop_reason
            is_call = self.num_calls > 0 and output.finish_reason == "stop"
            self.finish_reason = "tool_calls" if is_call else output.finish_reason  # type: ignore[assignment]
        return pieces

    def _is_wanted(self, piece: Piece) -> bool:
        """Counts calls and keeps reasoning on the way."""
        if isinstance(piece, Reasoning):
            self.reasoning.append(piece.text)
            return self.shows_reasoning
        if isinstance(piece, (ToolStart, ToolArguments)):
            if self.max_calls is not None and piece.index >= self.max_calls:
                return False
            self.num_calls = max(self.num_calls, piece.index + 1)
        return True


def message_of(pieces: list[Piece]) -> AnswerMessage:
    """All of an answer. Content is null beside calls or reasoning alone."""
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning)) or None
    calls = [
        ToolCall(_new_call_id(), FunctionCall(start.name, _arguments(pieces, start.index)))
        for start in pieces
        if isinstance(start, ToolStart)
    ]
    is_silent = not content and (calls or reasoning)
    return AnswerMessage(
        None if is_silent else content,
        tool_calls=calls or None,
        reasoning=reasoning,
        reasoning_content=reasoning,
    )


def delta_of(piece: Piece) -> MessageDelta:
    if isinstance(piece, Content):
        return MessageDelta(content=piece.text)
    if isinstance(piece, Reasoning):
        return MessageDelta(reasoning=piece.text, reasoning_content=piece.text)
    if isinstance(piece, ToolStart):
        function = FunctionDelta("", name=piece.name)
        return MessageDelta(
            tool_calls=[ToolCallDelta(piece.index, function, id=_new_call_id(), type="function")]
        )
    return MessageDelta(tool_calls=[ToolCallDelta(piece.index, FunctionDelta(piece.text))])


def _arguments(pieces: list[Piece], index: int) -> str:
    return "".join(
        piece.text for piece in pieces if isinstance(piece, ToolArguments) and piece.index == index
    )


def _new_call_id() -> str:
    return "call_" + new_id()
