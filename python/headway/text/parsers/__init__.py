"""What a model's output means: reasoning, answer, tool calls. Whole or streamed, the result is the same."""

from headway.text.parsers.formats import OutputFormat, OutputParser, detect_format
from headway.text.parsers.pieces import Content, Piece, Reasoning, ToolArguments, ToolStart, joined

__all__ = [
    "Content",
    "OutputFormat",
    "OutputParser",
    "Piece",
    "Reasoning",
    "ToolArguments",
    "ToolStart",
    "detect_format",
    "joined",
]
