"""Bad words as token sequences. What a tokenizer makes of a word depends on whether a space comes before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headway.errors import RequestError


def bad_word_tokens(
    words: Sequence[str | Sequence[int]], encode: Callable[[str], list[int]] | None
) -> list[list[int]]:
    """Each word as it goes on from what comes before and as a space sets it apart; token sequences as they are, and so
    is what begins with a line break or is white space alone.

    The form with a space is left out where it ends with the other, which is then banned anyway. Raises RequestError
    for text without a tokenizer.
    """
    sequences: list[list[int]] = []
    for word in words:
        for sequence in _forms(word, encode) if isinstance(word, str) else [[int(token) for token in word]]:
            if sequence and sequence not in sequences:
                sequences.append(sequence)
    return sequences


def _forms(word: str, encode: Callable[[str], list[int]] | None) -> list[list[int]]:
    if encode is None:
        raise RequestError("bad_words", word, "token ids: this model has no tokenizer")
    text = word.lstrip(" ")
    if not text or text[0].isspace():
        return [encode(word)]
    bare, spaced = encode(text), encode(" " + text)
    return [bare] if spaced[-len(bare) :] == bare else [bare, spaced]
