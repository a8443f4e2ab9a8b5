"""Log-probabilities as the two endpoints spell them. Values pass as they came: no rounding, no second source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headway.outputs import Logprob, PromptLogprobs, TokenLogprobs
from headway.server.schemas.chat import ChatLogprobs, TokenLogprob, TopLogprob
from headway.server.schemas.completions import CompletionLogprobs
from headway.text import IncrementalDetokenizer, Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have


class TokenNames:
    """How tokens are written in a reply: their text, or `token_id:N`."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token_id: int, entry: Logprob | None = None) -> str:
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        if entry is not None and entry.decoded_token is not None:
            return entry.decoded_token
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def utf8(self, token_id: int, name: str) -> list[int] | None:
        """The token's own bytes, which may be a part of a character alone."""
        if self._tokenizer is None or self._as_ids:
            return None
        if self._tokenizer.is_byte_level:
            return list(self._tokenizer.token_bytes(token_id))
        return list(name.encode())


class TextOffsets:
    """Where the tokens of a choice begin in its text. A token within a character begins where the character does.

    Args:
        echoed_text: the prompt, where it is part of the text; its tokens come first then.
        skips_special: of the output; special tokens that are not in the text take no place in it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_ids: Sequence[int],
        echoed_text: str | None,
        *,
        skips_special: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._offset = 0
        self._echoed_text = echoed_text or ""
        self._num_echoed_left = 0 if echoed_text is None else len(prompt_ids)
        if tokenizer is not None:
            self._echoed = IncrementalDetokenizer(tokenizer)
            self._output = IncrementalDetokenizer(tokenizer, prompt_ids, skips_special)

    def place(self, token_id: int) -> int:
        """Of the next token. Without a tokenizer there is no text."""
        offset = self._offset
        if self._tokenizer is None:
            return offset
        if not self._num_echoed_left:
            self._offset += len(self._output.append(token_id))
            return offset
        self._num_echoed_left -= 1
        self._offset += self._num_echoed_chars(self._tokenizer, token_id)
        if not self._num_echoed_left:
            self._offset = len(self._echoed_text)
        return offset

    def _num_echoed_chars(self, tokenizer: Tokenizer, token_id: int) -> int:
        """A special token was spelled out in the prompt, or added to it: then it is not in the text."""
        if token_id not in tokenizer.special_ids:
            return len(self._echoed.append(token_id))
        spelling = tokenizer.id_to_token(token_id) or ""
        return len(spelling) if self._echoed_text.startswith(spelling, self._offset) else 0


class CompletionLogprobsWriter:
    """Of one choice, from one piece of a stream to the next."""

    def __init__(self, names: TokenNames, num_top: int, offsets: TextOffsets) -> None:
        self._names = names
        self._num_top = num_top
        self._offsets = offsets

    def write(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        reply = CompletionLogprobs([], [], [], [])
        for token_id, entry in zip(token_ids, entries, strict=True):
            chosen = entry.get(token_id) if entry else None
            name = self._names.name(token_id, chosen)
            reply.tokens.append(name)
            reply.token_logprobs.append(finite(chosen.logprob) if chosen else None)
            reply.top_logprobs.append(self._top(token_id, entry) if entry else None)
            reply.text_offset.append(self._offsets.place(token_id))
        return reply

    def _top(self, token_id: int, entry: TokenLogprobs) -> dict[str, float]:
        """Two tokens may have one text: the chosen one's value stays."""
        top: dict[str, float] = {}
        for other_id in top_ids(token_id, entry, self._num_top):
            top.setdefault(self._names.name(other_id, entry[other_id]), finite(entry[other_id].logprob))
        return top


def top_ids(token_id: int, entry: TokenLogprobs, num_top: int) -> list[int]:
    """The chosen token and the num_top most likely ones, most likely first after the chosen."""
    ranked = sorted((i for i in entry if i != token_id), key=lambda i: -entry[i].logprob)
    rank = entry[token_id].rank if token_id in entry else None
    num_others = num_top - 1 if rank is not None and rank <= num_top else num_top
    chosen = [token_id] if token_id in entry else []
    return chosen + ranked[: max(0, num_others)]


def chat_logprobs(
    names: TokenNames, token_ids: Sequence[int], entries: Sequence[TokenLogprobs], num_top: int
) -> ChatLogprobs:
    content = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        name = names.name(token_id, entry[token_id])
        ids = sorted(top_ids(token_id, entry, num_top), key=lambda i: -entry[i].logprob)[:num_top]
        top = [_top(names, other_id, entry[other_id]) for other_id in ids]
        content.append(TokenLogprob(name, finite(entry[token_id].logprob), names.utf8(token_id, name), top))
    return ChatLogprobs(content)


def _top(names: TokenNames, token_id: int, entry: Logprob) -> TopLogprob:
    name = names.name(token_id, entry)
    return TopLogprob(name, finite(entry.logprob), names.utf8(token_id, name))


def prompt_logprobs_json(
    names: TokenNames, prompt_logprobs: PromptLogprobs | None
) -> list[dict[str, Any] | None] | None:
    """The `prompt_logprobs` extension: token id -> logprob, rank, text."""
    if prompt_logprobs is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": finite(found.logprob),
                "rank": found.rank,
                "decoded_token": names.name(token_id, found),
            }
            for token_id, found in entry.items()
        }
        for entry in prompt_logprobs
    ]


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)
