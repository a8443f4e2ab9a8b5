"""What one engine can accept of a request. Checked at submission, before anything is allocated for it."""

from __future__ import annotations

import numbers
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headway.errors import RequestError
from headway.request import SamplingParams


@dataclass(frozen=True)
class RequestLimits:
    """Bounds that follow from the model and the engine's settings."""

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    max_stop_ids: int
    max_logit_bias: int
    max_bad_word_entries: int
    eos_token_ids: tuple[int, ...]

    def check_prompt(
        self, token_ids: Sequence[int] | npt.NDArray[np.integer], max_tokens: int | None = None
    ) -> npt.NDArray[np.int32]:
        """The prompt's last max_tokens (-1: that fit, None: all) as [n] int32.

        Raises RequestError when empty, too long, or with ids out of range.
        """
        if len(token_ids) == 0:
            raise RequestError("prompt", token_ids, "at least one token")
        if max_tokens is not None:
            token_ids = token_ids[-(self.max_model_len - 1 if max_tokens == -1 else max_tokens) :]
        if len(token_ids) >= self.max_model_len:
            limit = f"shorter than max_model_len ({self.max_model_len} tokens)"
            raise RequestError("prompt", f"{len(token_ids)} tokens", limit, hint="raise --max-model-len")
        return self._check_ids("prompt_token_ids", token_ids).astype(np.int32)

    def check_params(self, params: SamplingParams) -> None:
        """Raises RequestError for what only this model or engine rules out."""
        if not isinstance(params, SamplingParams):
            raise RequestError("sampling_params", params, "SamplingParams, or a list of them, one per prompt")
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_ids("logit_bias", list(params.logit_bias or ()))
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        num_stop_ids = len(self.stop_ids(params))
        if num_stop_ids > self.max_stop_ids:
            raise RequestError(
                "stop_token_ids", f"{num_stop_ids} ids", f"at most {self.max_stop_ids} with the end tokens"
            )
        if len(params.logit_bias or ()) > self.max_logit_bias:
            raise RequestError(
                "logit_bias", len(params.logit_bias or ()), f"at most {self.max_logit_bias} ids"
            )
        allowed = params.allowed_token_ids
        if params.min_tokens and allowed is not None and set(allowed) <= set(self.stop_ids(params)):
            limit = "0 where allowed_token_ids has end and stop tokens alone"
            raise RequestError("min_tokens", params.min_tokens, limit)
        self.num_logprobs("logprobs", params.logprobs)
        self.num_logprobs("prompt_logprobs", params.prompt_logprobs)

    def num_logprobs(self, name: str, asked: int | None) -> int:
        """Alternatives to report, -1 for not even the token itself. Raises RequestError where that is too many."""
        if asked is None:
            return -1
        wanted = self.vocab_size if asked == -1 else asked
        if wanted > self.max_logprobs:
            limit = f"at most max_logprobs ({self.max_logprobs})"
            raise RequestError(name, wanted, limit, hint="raise --max-logprobs")
        return wanted

    def check_bad_words(self, words: Sequence[Sequence[int]]) -> None:
        for word in words:
            self._check_ids("bad_words", word)
        num_entries = len(words) + sum(map(len, words))
        if num_entries > self.max_bad_word_entries:
            limit = f"at most {self.max_bad_word_entries} words and tokens of words"
            raise RequestError("bad_words", num_entries, limit)

    def token_mask(self, allowed: Sequence[int] | None) -> npt.NDArray[np.uint32]:
        """[ceil(V / 32)] bit v % 32 of word v / 32 for each allowed token v; empty for None."""
        if allowed is None:
            return np.zeros(0, np.uint32)
        bits = np.zeros((self.vocab_size + 31) // 32 * 32, np.bool_)
        bits[np.asarray(allowed)] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def stop_ids(self, params: SamplingParams) -> list[int]:
        """Ids that end the row on the device."""
        ends = () if params.ignore_eos else self.eos_token_ids
        return sorted({*ends, *(params.stop_token_ids or ())})

    def max_new_tokens(self, prompt_len: int, params: SamplingParams) -> int:
        room = self.max_model_len - prompt_len
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def _check_ids(self, name: str, ids: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """The ids as an array [n]. Prompts are long: plain integers are looked at in C alone."""
        values = _integers(ids)
        if values is not None and not ((values < 0) | (values >= self.vocab_size)).any():
            return values
        for token in ids:
            is_int = isinstance(token, numbers.Integral) and not isinstance(token, bool)
            if not is_int or not 0 <= int(token) < self.vocab_size:
                raise RequestError(name, token, f"token ids in [0, {self.vocab_size})")
        return np.asarray(ids, np.int64)


def _integers(ids: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.integer] | None:
    """None for what is not plain integers of 64 bits in a row."""
    if isinstance(ids, np.ndarray):
        return ids if ids.dtype.kind in "iu" and ids.ndim == 1 else None
    if not set(map(type, ids)) <= {int}:  # a bool is an int to isinstance, and to array
        return None
    try:
        return np.asarray(array("q", ids))
    except OverflowError:
        return None
