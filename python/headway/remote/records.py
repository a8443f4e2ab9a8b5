"""Requests and outputs as messages, and back. Sampling parameters are checked again where they arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import get_type_hints

import msgspec

from headway.remote.messages import Add, Output, ProtocolError
from headway.request import SamplingParams
from headway.server.client import EngineOutput, EngineRequest, Usage

_PARAM_TYPES = get_type_hints(SamplingParams)
_PARAMS = msgspec.defstruct(
    "SamplingParams",
    [(f.name, _PARAM_TYPES[f.name], f.default) for f in fields(SamplingParams) if f.default is not MISSING],
    omit_defaults=True,
    forbid_unknown_fields=True,
)
_encode = msgspec.msgpack.Encoder().encode
_decode_params = msgspec.msgpack.Decoder(_PARAMS).decode


def to_add(number: int, request: EngineRequest, *, has_text: bool = True) -> Add:
    """Without text, the engine is asked for token ids alone."""
    values = vars(request.params)
    params = _PARAMS(**values if has_text else {**values, "detokenize": False})
    return Add(
        number=number,
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        params=msgspec.Raw(_encode(params)),
        priority=request.priority,
        cache_salt=request.cache_salt,
        use_prefix_cache=request.use_prefix_cache,
    )


def to_request(add: Add) -> EngineRequest:
    """Raises ProtocolError for parameters of a wrong type or name, RequestError for those out of range."""
    try:
        params = _decode_params(add.params)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise ProtocolError(f"sampling parameters are malformed: {error}") from error
    return EngineRequest(
        request_id=add.request_id,
        prompt_token_ids=add.prompt_token_ids,
        params=SamplingParams(**msgspec.structs.asdict(params)),
        priority=add.priority,
        cache_salt=add.cache_salt,
        use_prefix_cache=add.use_prefix_cache,
    )


def to_output(number: int, output: EngineOutput) -> Output:
    usage = output.usage
    return Output(
        number,
        output.index,
        output.text,
        output.token_ids,
        usage.num_prompt_tokens,
        usage.num_output_tokens,
        usage.num_cached_tokens,
        output.finish_reason,  # type: ignore[arg-type]  # one of these four, by its own description
        output.stop_reason,
        output.logprobs,
        output.prompt_logprobs,
        output.metrics,
    )


def joined(parts: Sequence[Output]) -> Output:
    """Outputs of one completion that follow each other, as one."""
    last = parts[-1]
    if len(parts) == 1:
        return last
    logprobs = None
    if last.logprobs is not None:
        logprobs = [entry for part in parts for entry in part.logprobs or ()]
    return msgspec.structs.replace(
        last,
        text="".join(part.text for part in parts),
        token_ids=[token for part in parts for token in part.token_ids],
        logprobs=logprobs,
        prompt_logprobs=next((p.prompt_logprobs for p in parts if p.prompt_logprobs is not None), None),
    )


def to_engine_output(request_id: str, output: Output) -> EngineOutput:
    return EngineOutput(
        request_id,
        output.index,
        output.text,
        output.token_ids,
        Usage(output.num_prompt_tokens, output.num_output_tokens, output.num_cached_tokens),
        output.logprobs,
        output.finish_reason,
        output.stop_reason,
        output.prompt_logprobs,
        output.metrics,
    )
