"""Text of an output while it grows: what is appended returns the characters that the new tokens completed.

The pieces joined are what decoding the whole sequence adds to the decoded prompt, except that a character whose bytes
are spread over several tokens is held until its last byte is there. Cost per token does not grow with the output.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from headway.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
_MAX_CHAR_BYTES = 4
_MAX_CHAR_TOKENS = _MAX_CHAR_BYTES  # a token has at least one
_MAX_CONTEXT_TOKENS = 32


class _Stream(Protocol):
    """`append` is given ids of the vocabulary, all else any."""

    def append(self, token_id: int) -> str: ...
    def extend(self, token_ids: Sequence[int]) -> str: ...
    def finish(self) -> str: ...


class IncrementalDetokenizer:
    """Fed with tokens one by one or many at once; each call returns new text, possibly empty."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        *,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._joined_ids = frozenset() if spaces_between_special_tokens else tokenizer.special_ids
        self._last_id = -1
        self._skipped_ids = tokenizer.special_ids if skip_special_tokens else frozenset()
        context = [i for i in prompt_ids[-_MAX_CONTEXT_TOKENS:] if i not in self._skipped_ids]
        self._stream: _Stream = (
            _ByteStream(tokenizer, context) if tokenizer.is_byte_level else _WindowStream(tokenizer, context)
        )

    def append(self, token_id: int) -> str:
        """The text that token_id completes."""
        if not self._is_text(token_id):
            return ""
        text = self._stream.append(token_id)
        is_joined = token_id in self._joined_ids and self._last_id in self._joined_ids
        self._last_id = token_id
        return text.lstrip(" ") if is_joined else text

    def extend(self, token_ids: Sequence[int]) -> str:
        """`append` of each, joined, for less: most tokens of a batch's outputs take this way."""
        if self._joined_ids:
            return "".join([self.append(token_id) for token_id in token_ids])
        skipped_ids = self._skipped_ids
        return self._stream.extend([token_id for token_id in token_ids if token_id not in skipped_ids])

    def finish(self) -> str:
        """What is still held: a character that was cut short comes out as U+FFFD, as decode() writes it."""
        return self._stream.finish()

    def _is_text(self, token_id: int) -> bool:
        return token_id not in self._skipped_ids and self._tokenizer.id_to_token(token_id) is not None


class _ByteStream:
    """Byte-level vocabularies: the tokens' bytes as UTF-8. What begins a character is held until its last byte is
    there, as codecs' incremental decoder does in two layers of Python, for each output of each stream.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._held = b""
        self._decode(self._last_bytes(context))
        # A prompt that ends within a character already shows U+FFFD for it.
        self._num_shown = 1 if self._held else 0

    def _last_bytes(self, context: Sequence[int]) -> bytes:
        """As many as can belong to a character that the context cuts short: none where the last is one by itself."""
        found = b""
        for token_id in reversed(context):
            found = self._token_bytes(token_id) + found
            if found and found[-1] < 0x80:
                return b""
            if len(found) >= _MAX_CHAR_BYTES - 1:
                break
        return found

    def append(self, token_id: int) -> str:
        return self._new(self._decode(self._token_bytes(token_id)))

    def extend(self, token_ids: Sequence[int]) -> str:
        """An id without a token has no bytes."""
        return self._new(self._decode(b"".join(map(self._token_bytes, token_ids))))

    def finish(self) -> str:
        return self._new(self._decode(b"", is_end=True))

    def _decode(self, data: bytes, *, is_end: bool = False) -> str:
        data = self._held + data
        text, num_bytes = codecs.utf_8_decode(data, "replace", is_end)
        self._held = data[num_bytes:]
        return text

    def _new(self, text: str) -> str:
        if not text or not self._num_shown:
            return text
        self._num_shown = 0
        return text[1:]


class _WindowStream:
    """Any other decoder (Metaspace, byte fallback, WordPiece): decodes a short window and returns its growth.

    Decoders look at neighbours (a leading space is dropped, a run of byte tokens is one unit), so the window keeps the
    tokens of the last complete piece as context. `_num_shown` characters of the window's text are already out.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = self._whole_context(self._known(context))
        self._num_pending = 0  # tokens at the window's end whose text is not out yet
        self._num_shown = len(self._decode(self._window))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _known(self, token_ids: Sequence[int]) -> list[int]:
        return [token_id for token_id in token_ids if self._tokenizer.id_to_token(token_id) is not None]

    def _whole_context(self, context: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, starting where no character is cut if there is such a place."""
        start = max(0, len(context) - _MAX_CHAR_TOKENS)
        while start > 0 and self._decode(context[start:]).startswith(REPLACEMENT):
            start -= 1
        return list(context[start:])

    def append(self, token_id: int) -> str:
        self._window.append(token_id)
        self._num_pending += 1
        text = self._decode(self._window)
        if not text.endswith(REPLACEMENT):
            return self._show(text, num_held=0, num_context=self._num_pending)
        if self._num_pending > _MAX_CHAR_TOKENS:  # not the start of a character: all but the last is final
            return self._show(text, num_held=1, num_context=_MAX_CHAR_TOKENS)
        return ""

    def extend(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.append, self._known(token_ids)))

    def finish(self) -> str:
        return self._show(self._decode(self._window), num_held=0, num_context=len(self._window))

    def _show(self, text: str, num_held: int, num_context: int) -> str:
        piece = text[self._num_shown : len(text) - num_held]
        self._window = self._window[-num_context:] if num_context else []
        self._num_pending = num_held
        self._num_shown = len(self._decode(self._window)) - num_held
        return piece
