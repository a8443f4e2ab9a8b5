"""What a structured output may continue with: grammars over a model's tokens, by llguidance (extra `grammar`).

A grammar is compiled in milliseconds whatever it says: lexer and parser states come into being as the text reaches
them. What each step of that may cost is counted and bounded by `LLParserLimits`, and a grammar that needs more ends in
an error. So a thread is enough and nothing needs to be killed. A process of its own could be killed, but could not hand
the compiled grammar back.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headway.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_KEPT_GRAMMARS = 64


class GrammarError(Exception):
    """The grammar cannot go on: a limit was reached, or a token came that it does not allow."""


class GrammarState:
    """Where one output is in its grammar. One thread at a time."""

    def __init__(self, matcher: LLMatcher, num_words: int) -> None:
        self._matcher = matcher
        self._num_words = num_words

    def advance(self, token: int) -> None:
        """Raises GrammarError where the token is not allowed."""
        if not self._matcher.consume_token(token):
            raise GrammarError(_first_line(self._matcher.get_error()) or f"token {token} is not allowed")

    def mask(self) -> npt.NDArray[np.uint32]:
        """[ceil(V / 32)] bit v % 32 of word v / 32: token v may come next. Raises GrammarError."""
        words = np.zeros(self._num_words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)  # gives up the GIL
        if self._matcher.is_error():
            raise GrammarError(_first_line(self._matcher.get_error()))
        return words


class GrammarCompiler:
    """Turns `SamplingParams.structured_outputs` into states to begin from, and keeps the last few. Thread-safe.

    Args:
        tokenizer_json: content of tokenizer.json.
        vocab_size: V of the model, which may be wider than the tokenizer's.
        eos_token_ids: allowed where the grammar may end.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, form: Mapping[str, Any]) -> GrammarState:
        """A state before the first token. Raises RequestError for a form that cannot be compiled."""
        key = json.dumps(dict(form), default=str)
        with self._lock:
            matcher = self._kept.get(key)
            if matcher is None:
                matcher = self._kept[key] = self._compile(form)
                if len(self._kept) > MAX_KEPT_GRAMMARS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return GrammarState(matcher.deep_copy(), (self._vocab_size + 31) // 32)

    def _compile(self, form: Mapping[str, Any]) -> LLMatcher:
        kind, value = next(iter(form.items()))
        try:
            import llguidance
        except ImportError as cause:
            hint = "pip install 'headway[grammar]'"
            raise RequestError("structured_outputs", kind, "unset without llguidance", hint=hint) from cause
        if self._tokenizer is None:
            self._tokenizer = llguidance.LLTokenizer(
                self._tokenizer_json, n_vocab=self._vocab_size, eos_token=self._eos_token_ids
            )
        try:
            grammar = _grammar_text(kind, value)
        except ValueError as error:
            raise RequestError("structured_outputs", kind, f"what can be compiled: {error}") from error
        matcher = llguidance.LLMatcher(
            self._tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits()
        )
        if matcher.is_error():
            fault = _first_line(matcher.get_error())
            raise RequestError("structured_outputs", kind, f"what can be compiled: {fault}")
        return matcher


def _grammar_text(kind: str, value: Any) -> str:
    """In llguidance's own notation. Raises ValueError."""
    from llguidance import LLMatcher, gbnf_to_lark

    if kind == "json":
        return LLMatcher.grammar_from_json_schema(value)
    if kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"})
    if kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in value))
    return LLMatcher.grammar_from_lark(gbnf_to_lark.any_to_lark(value))


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]
