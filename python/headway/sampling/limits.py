"""What one engine can accept of a request. Checked at submission, before anything is allocated for it."""

from __future__ import annotations

import numbers
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
    eos_token_ids: tuple[int, ...]

    def check_prompt(self, token_ids: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        """The prompt as [n] int32. Raises RequestError when empty, too long, or with ids out of range."""
        if len(token_ids) == 0:
            raise RequestError("prompt", token_ids, "at least one token")
        if len(token_ids) >= self.max_model_len:
            limit = f"shorter than max_model_len ({self.max_model_len} tokens)"
            raise RequestError("prompt", f"{len(token_ids)} tokens", limit, hint="raise --max-model-len")
        for token in token_ids:
            if not self._is_token(token):
                raise RequestError("prompt_token_ids", token, f"token ids in [0, {self.vocab_size})")
        return np.asarray(token_ids, dtype=np.int32)

    def check_params(self, params: SamplingParams) -> None:
        """Raises RequestError for what only this model or engine rules out."""
        if not isinstance(params, SamplingParams):
            raise RequestError("sampling_params", params, "SamplingParams, or a list of them, one per prompt")
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token in ids or ():
                if not self._is_token(token):
                    raise RequestError(name, token, f"token ids in [0, {self.vocab_size})")
        num_stop_ids = len(self.stop_ids(params))
        if num_stop_ids > self.max_stop_ids:
            raise RequestError(
                "stop_token_ids", f"{num_stop_ids} ids", f"at most {self.max_stop_ids} with the end tokens"
            )
        if len(params.logit_bias or ()) > self.max_logit_bias:
            raise RequestError(
                "logit_bias", f"{len(params.logit_bias or ())} ids", f"at most {self.max_logit_bias} ids"
            )
        if (params.logprobs or 0) > self.max_logprobs:
            raise RequestError(
                "logprobs",
                params.logprobs,
                f"at most max_logprobs ({self.max_logprobs})",
                hint="raise --max-logprobs",
            )

    def stop_ids(self, params: SamplingParams) -> list[int]:
        """Ids that end the row on the device."""
        ends = () if params.ignore_eos else self.eos_token_ids
        return sorted({*ends, *(params.stop_token_ids or ())})

    def max_new_tokens(self, prompt_len: int, params: SamplingParams) -> int:
        room = self.max_model_len - prompt_len
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def _is_token(self, token: object) -> bool:
        return (
            isinstance(token, numbers.Integral)
            and not isinstance(token, bool)
            and 0 <= int(token) < self.vocab_size
        )
