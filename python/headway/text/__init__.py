"""Text in and out: tokens of a prompt, text of an output while it grows, prompts of a conversation."""

from headway.text.chat_template import ChatTemplate
from headway.text.detokenizer import IncrementalDetokenizer
from headway.text.literals import Literals
from headway.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "Literals", "Tokenizer"]
