"""Special tokens that somebody typed: text in a message that spells `<|im_end|>` must not end the message.

Before a template is rendered each such spelling is replaced by a mark that no text can guess; after it, the marks are
encoded as the plain text they stand for. What the template itself writes stays special.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headway.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as text and as token ids."""

    text: str
    token_ids: list[int]


class Literals:
    """For one prompt: `hide` in all that came from outside, render, `encode` the result."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._nonce = secrets.token_hex(8)
        self._spellings: list[str] = []

    def hide(self, value: object, kept: Sequence[str] = ()) -> object:
        """Strings within lists and mappings too. `kept` are special tokens that stay what they are."""
        if isinstance(value, str):
            pattern = self._tokenizer.special_pattern
            return value if pattern is None else pattern.sub(lambda found: self._mark(found[0], kept), value)
        if isinstance(value, list):
            return [self.hide(item, kept) for item in value]
        if isinstance(value, Mapping):
            return {key: self.hide(item, kept) for key, item in value.items()}
        return value

    def _mark(self, spelling: str, kept: Sequence[str]) -> str:
        if spelling in kept:
            return spelling
        self._spellings.append(spelling)
        return f"\ue000{self._nonce}:{len(self._spellings) - 1}\ue001"

    def encode(self, rendered: str, *, add_special_tokens: bool) -> Encoded:
        if not self._spellings:
            return Encoded(rendered, self._tokenizer.encode(rendered, add_special_tokens))
        parts = re.split(f"\ue000{self._nonce}:(\\d+)\ue001", rendered)
        text, token_ids = parts[0], self._tokenizer.encode(parts[0], add_special_tokens)
        for index, after in zip(parts[1::2], parts[2::2], strict=True):
            spelling = self._spellings[int(index)]
            text += spelling + after
            token_ids += self._tokenizer.encode_literally(spelling)
            token_ids += self._tokenizer.encode(after, add_special_tokens=False)
        return Encoded(text, token_ids)
