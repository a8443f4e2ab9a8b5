"""Text to token ids and back, from a checkpoint's `tokenizer.json`. Knows nothing of models or requests."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from headway.errors import ModelLoadError, RequestError
from headway.files import read_text
from headway.text.special_tokens import read_special_tokens

# From here on the backend's calls for batches are made, which give up the GIL and take less time a text. They start a
# pool of threads, so a program that forks gets a warning: not for a few words.
LONG_TEXT_CHARS = 8192


def _byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's table, rebuilt from its rule).

    Bytes that print stand for themselves, the other 68 for the letters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """A checkpoint's vocabulary. Ids are below `vocab_size`; the model's logits may be wider (padding)."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str] | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Reads `tokenizer.json` and the special tokens that tokenizer_config.json or special_tokens_map.json name.

        Raises ModelLoadError when tokenizer.json is missing or malformed.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            hint = "save it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            raise ModelLoadError(f"{folder} has no tokenizer.json", hint=hint)
        try:
            backend = tokenizers.Tokenizer.from_str(read_text(file))
        except ModelLoadError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelLoadError(f"{file} is not a tokenizer: {error}") from error
        return cls(backend, read_special_tokens(folder))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that decode() leaves out when skip_special_tokens is set."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text. BOS is added where tokenizer.json's post-processor says so, as transformers does.

        A rendered chat template already holds its special tokens: pass add_special_tokens=False.
        """
        try:
            return _encode(self._backend, text, add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError("text", text, "a string of valid Unicode, without lone surrogates") from error

    def encode_literally(self, text: str) -> list[int]:
        """Token ids of text in which the spelling of a special token is text like any other.

        A vocabulary whose plain pieces hold the spelling as well is asked for one character at a time.
        """
        token_ids = self._encode_plain(text)
        if self.special_ids.isdisjoint(token_ids):
            return token_ids
        return [token_id for char in text for token_id in self._encode_plain(char)]

    def _encode_plain(self, text: str) -> list[int]:
        return _encode(self._literal_backend, text, add_special_tokens=False)

    @cached_property
    def _literal_backend(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Finds spellings of special tokens; None where the vocabulary has none."""
        spellings = [token for i in self.special_ids if (token := self.id_to_token(i))]
        longest_first = sorted(spellings, key=lambda token: (-len(token), token))
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token_ids; bytes that are not UTF-8 become U+FFFD, ids without a token nothing."""
        try:
            if len(token_ids) < LONG_TEXT_CHARS:
                return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
            return str(
                self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)[0]
            )
        except OverflowError as error:
            raise RequestError("token_ids", min(token_ids), "in [0, 2**32)") from error

    def to_json(self) -> str:
        """The content of tokenizer.json, without truncation and padding."""
        return str(self._backend.to_str())

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token, None for an id it does not have."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    @cached_property
    def is_byte_level(self) -> bool:
        """True when a text is the plain concatenation of its tokens' bytes (GPT-2 style vocabularies)."""
        decoder = json.loads(self._backend.to_str()).get("decoder") or {}
        return decoder.get("type") == "ByteLevel"

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        return {}

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes a token of a byte-level vocabulary stands for; empty for an id without a token."""
        cached = self._token_bytes.get(token_id)
        if cached is None:
            cached = self._token_bytes[token_id] = _bytes_of(self.id_to_token(token_id) or "")
        return cached


def _encode(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    if len(text) < LONG_TEXT_CHARS:
        return list(backend.encode(text, add_special_tokens=add_special_tokens).ids)
    return list(backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)


_BYTE_OF_LETTER = _byte_of_letter()


def _bytes_of(token: str) -> bytes:
    """An added token may hold letters outside the table (a space, say); it then stands for its own UTF-8 bytes."""
    if all(letter in _BYTE_OF_LETTER for letter in token):
        return bytes(_BYTE_OF_LETTER[letter] for letter in token)
    return token.encode()
