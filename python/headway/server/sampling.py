"""Request fields -> `SamplingParams`, over the model's defaults. Ranges are checked there, not here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from headway.errors import RequestError
from headway.request import RequestOutputKind, SamplingParams
from headway.server.errors import bad_request, shown
from headway.server.schemas.common import SamplingFields

_SAME_NAMES = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "prompt_logprobs",
)


def sampling_params(fields: SamplingFields, defaults: Mapping[str, Any], **changes: Any) -> SamplingParams:
    """`defaults` are the model's own; `changes` are keywords that the endpoint works out itself.

    Raises ApiError or RequestError.
    """
    check_stream_options(fields)
    given = {name: value for name in _SAME_NAMES if (value := getattr(fields, name)) is not None}
    if fields.seed is not None and fields.seed != -1:  # -1 means none, as other servers have it
        given["seed"] = _seed(fields.seed)
    if fields.logit_bias:
        given["logit_bias"] = _logit_bias(fields.logit_bias)
    given["output_kind"] = RequestOutputKind.DELTA if fields.stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams(**{**defaults, **given, **changes})


def changed_fields(params: SamplingParams) -> dict[str, Any]:
    """What differs from the class's own defaults: few keywords are checked faster than all."""
    plain = SamplingParams()
    found = ((f.name, getattr(params, f.name)) for f in dataclasses.fields(params))
    return {name: value for name, value in found if value != getattr(plain, name)}


def check_stream_options(fields: SamplingFields) -> None:
    if fields.stream_options is not None and not fields.stream:
        raise bad_request("stream_options", "stream_options goes with stream=true alone")


def num_kept_tokens(fields: SamplingFields, max_tokens: int | None, max_model_len: int) -> int | None:
    """Tokens at the prompt's end that truncate_prompt_tokens leaves; None: all."""
    asked = fields.truncate_prompt_tokens
    if asked == 0:
        raise bad_request("truncate_prompt_tokens", "truncate_prompt_tokens must be at least 1, or -1")
    room = max(1, max_model_len - (max_tokens or 1))
    return room if asked == -1 else asked


def check_length(num_prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> None:
    """A length that was asked for must fit; one that was not is cut to what does."""
    if num_prompt_tokens >= max_model_len or num_prompt_tokens + (max_tokens or 1) > max_model_len:
        asked = f" and {max_tokens} for the answer" if max_tokens else ""
        raise bad_request(
            "max_tokens" if max_tokens and num_prompt_tokens < max_model_len else "prompt",
            f"this model's context is {max_model_len} tokens; the prompt has {num_prompt_tokens}{asked}",
            "context_length_exceeded",
        )


def _seed(seed: int) -> int:
    if not -(2**63) <= seed < 2**64:
        raise RequestError("seed", shown(seed), "an integer of 64 bits")
    return seed % 2**64


def _logit_bias(biases: dict[str, float]) -> dict[int, float]:
    """JSON has no integer keys."""
    converted = {}
    for name, bias in biases.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise bad_request("logit_bias", f"logit_bias is keyed by token ids, got {shown(name)}")
        converted[int(name)] = bias
    return converted
