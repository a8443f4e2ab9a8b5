"""What a structured output may continue with: grammars over a model's tokens, by llguidance (extra `grammar`).

Most grammars are compiled in milliseconds: lexer and parser states come into being as the text reaches them, and what
a step of that may cost is bounded by `LLParserLimits`. Compiling itself is not bounded by llguidance (an object with
4,000 optional properties takes seconds), so a grammar is compiled here only after a process that can be killed has done
so within its limits (`headway.sampling.grammar_trial`). The compiled grammar cannot be handed over.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from headway.errors import OverloadedError, RequestError
from headway.sampling.grammar_trial import GrammarError, GrammarTrial

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

MAX_KEPT_GRAMMARS = 64
MAX_KEPT_CHARS = 1 << 19  # of their forms; a compiled grammar may take 250 times its form's length
MAX_REFUSED = 256
MAX_WAIT_S = 5.0  # for the grammars of others to be compiled
# Where JSON may have white space, a model that likes it would write nothing else to its last token. Room for the
# indentation of the deepest form. A schema's own "x-guidance" goes before it.
_JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"[ \t\r\n]{0,128}"}


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
        if not words.any():
            raise GrammarError("no token may come next")
        return words


class GrammarCompiler:
    """Turns `SamplingParams.structured_outputs` into states to begin from, and keeps the last few. Thread-safe.

    Args:
        tokenizer_json: content of tokenizer.json.
        vocab_size: V of the model, which may be wider than the tokenizer's.
        eos_token_ids: allowed where the grammar may end.
        trial: compiles each grammar first, where that can be ended; None: no such thing.
    """

    _trial: GrammarTrial | None = None

    def __init__(
        self,
        tokenizer_json: str,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        trial: GrammarTrial | None = None,
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._num_words = num_mask_words(vocab_size)
        self._eos_token_ids = list(eos_token_ids)
        self._trial = trial
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._num_kept_chars = 0
        self._refused: OrderedDict[str, str] = OrderedDict()  # why
        self._lock = threading.Lock()  # of all above, never held for long
        self._turn = threading.Lock()  # one compiles at a time

    def prepare(self) -> None:
        """Reads the vocabulary, which keeps the interpreter for a second or two where it is large. Without llguidance,
        nothing: the first form says so.
        """
        with contextlib.suppress(ImportError), self._turn:
            if self._tokenizer is None:
                self._tokenizer = make_tokenizer(self._tokenizer_json, self._vocab_size, self._eos_token_ids)

    def start(self, form: Mapping[str, Any]) -> GrammarState:
        """A state before the first token. Raises RequestError for a form that cannot be compiled, OverloadedError
        where too many others are being compiled.
        """
        kind, key = next(iter(form)), json.dumps(dict(form), default=str)
        if (state := self._find(kind, key)) is not None:
            return state
        if not self._turn.acquire(timeout=MAX_WAIT_S):
            raise OverloadedError("too many grammars are being compiled", retry_after_s=MAX_WAIT_S)
        try:
            if self._find(kind, key) is None:
                self._compile(kind, key, form)
        finally:
            self._turn.release()
        state = self._find(kind, key)
        assert state is not None
        return state

    def close(self) -> None:
        """Ends what was started for compiling. Legal twice."""
        if self._trial is not None:
            self._trial.close()

    def _find(self, kind: str, key: str) -> GrammarState | None:
        """Raises RequestError for a form that was refused before."""
        with self._lock:
            if (why := self._refused.get(key)) is not None:
                raise RequestError("structured_outputs", kind, f"what can be compiled: {why}")
            if (matcher := self._kept.get(key)) is None:
                return None
            self._kept.move_to_end(key)
            return GrammarState(matcher.deep_copy(), self._num_words)

    def _compile(self, kind: str, key: str, form: Mapping[str, Any]) -> None:
        try:
            import llguidance  # noqa: F401
        except ImportError as cause:
            hint = "pip install 'headway[grammar]'"
            raise RequestError("structured_outputs", kind, "unset without llguidance", hint=hint) from cause
        if self._tokenizer is None:  # nobody has called `prepare`
            self._tokenizer = make_tokenizer(self._tokenizer_json, self._vocab_size, self._eos_token_ids)
        try:
            if self._trial is not None:
                self._trial.check(key)
            matcher = compiled(self._tokenizer, form)
            GrammarState(matcher.deep_copy(), self._num_words).mask()
        except GrammarError as error:
            with self._lock:
                self._refused[key] = str(error)
                if len(self._refused) > MAX_REFUSED:
                    self._refused.popitem(last=False)
            raise RequestError("structured_outputs", kind, f"what can be compiled: {error}") from error
        self._keep(key, matcher)

    def _keep(self, key: str, matcher: LLMatcher) -> None:
        """In place of those used longest ago. The new one stays, whatever its size."""
        with self._lock:
            self._kept[key] = matcher
            self._num_kept_chars += len(key)
            while len(self._kept) > 1 and (
                len(self._kept) > MAX_KEPT_GRAMMARS or self._num_kept_chars > MAX_KEPT_CHARS
            ):
                self._num_kept_chars -= len(self._kept.popitem(last=False)[0])


def num_mask_words(vocab_size: int) -> int:
    """Of 32 bits, one a token."""
    return (vocab_size + 31) // 32


def make_tokenizer(tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    import llguidance

    return llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids))


def compiled(tokenizer: LLTokenizer, form: Mapping[str, Any]) -> LLMatcher:
    """Raises GrammarError for a form that says nothing or too much."""
    import llguidance

    kind, value = next(iter(form.items()))
    try:
        grammar = _grammar_text(kind, value)
    except MemoryError:
        raise
    except Exception as error:  # GBNF's converter raises bare ones
        raise GrammarError(_first_line(str(error)) or "it is not valid") from error
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits())
    if matcher.is_error():
        raise GrammarError(_first_line(matcher.get_error()))
    return matcher


def _grammar_text(kind: str, value: Any) -> str:
    """In llguidance's own notation. Raises what its converters raise."""
    from llguidance import LLMatcher, gbnf_to_lark

    if kind == "json":
        is_bounded = "x-guidance" not in value  # a key, or part of a text
        return LLMatcher.grammar_from_json_schema(value, _JSON_OPTIONS if is_bounded else None)
    if kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, _JSON_OPTIONS)
    if kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in value))
    return LLMatcher.grammar_from_lark(gbnf_to_lark.any_to_lark(value))


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]
