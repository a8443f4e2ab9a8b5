"""Errors as OpenAI's clients read them: one envelope, one table of kinds. Knows no HTTP framework.

A message never shows a path, an address or a traceback: what is not listed here becomes "internal error" and an id
that the log repeats.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from headway.errors import CapacityError, EngineDeadError, OverloadedError, RequestError

logger = logging.getLogger("headway")

MAX_SHOWN_CHARS = 200  # of a caller's own value, in a message

Kind = Literal[
    "bad_request", "unauthorized", "forbidden_host", "not_found", "method_not_allowed", "timeout", "too_large",
    "unsupported_media_type", "headers_too_large", "rate_limited", "internal", "unavailable",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Row:
    status: int
    type: str
    code: str | None


ERROR_TABLE: dict[Kind, _Row] = {
    "bad_request": _Row(400, "invalid_request_error", None),
    "unauthorized": _Row(401, "invalid_request_error", "invalid_api_key"),
    "forbidden_host": _Row(403, "invalid_request_error", "host_not_allowed"),
    "not_found": _Row(404, "invalid_request_error", "not_found"),
    "method_not_allowed": _Row(405, "invalid_request_error", "method_not_allowed"),
    "timeout": _Row(408, "invalid_request_error", "request_timeout"),
    "too_large": _Row(413, "invalid_request_error", "request_too_large"),
    "unsupported_media_type": _Row(415, "invalid_request_error", "unsupported_media_type"),
    "headers_too_large": _Row(431, "invalid_request_error", "headers_too_large"),
    "rate_limited": _Row(429, "rate_limit_error", "rate_limit_exceeded"),
    "internal": _Row(500, "server_error", "internal_error"),
    "unavailable": _Row(503, "server_error", "unavailable"),
}


class ErrorBody(msgspec.Struct):
    """What is wrong: `param` names the field, `code` is stable, `message` is for people."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(msgspec.Struct):
    """Every reply that is not a success, and the last event but one of a stream that failed."""

    error: ErrorBody


@dataclass(slots=True)
class ApiError(Exception):
    """An error on its way to the client."""

    kind: Kind
    message: str
    param: str | None = None
    code: str | None = None  # in place of the kind's own
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def status(self) -> int:
        return ERROR_TABLE[self.kind].status

    @property
    def shown_code(self) -> str | None:
        return self.code or ERROR_TABLE[self.kind].code

    def body(self) -> bytes:
        error_type = ERROR_TABLE[self.kind].type
        return _encode(ErrorResponse(ErrorBody(self.message, error_type, self.param, self.shown_code)))


_encode = msgspec.json.Encoder().encode


def bad_request(param: str | None, message: str, code: str | None = None) -> ApiError:
    return ApiError("bad_request", message, param, code)


def unavailable(message: str, code: str, retry_after_s: float) -> ApiError:
    return ApiError("unavailable", message, None, code, retry_after(retry_after_s))


def failed_output(what: str | int | None) -> ApiError:
    """Of an output that ended with "error"; what: its `stop_reason`."""
    if what == "grammar":
        message = "the output cannot go on: its grammar allows no token here, or needs too much"
        return bad_request("structured_outputs", message, "grammar_failed")
    if what == "logits":
        message = "the model computed no usable probabilities for this request"
        return ApiError("internal", message, code="bad_logits")
    return ApiError("internal", "the output cannot be built; the server's log says why")


def retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds)))}


def shown(value: object) -> str:
    """A caller's value as a message may repeat it: bounded whatever its size."""
    if isinstance(value, str):
        value = value[:MAX_SHOWN_CHARS]
    elif isinstance(value, (list, tuple, dict)) and len(value) > 8:
        return f"{len(value)} items"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."


def from_exception(error: BaseException) -> ApiError:
    """Any exception as what the client may know of it. What is unexpected is logged under the id that it is given."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return _from_request_error(error)
    if isinstance(error, OverloadedError):
        return unavailable("too many requests are waiting", "overloaded", error.retry_after_s)
    if isinstance(error, EngineDeadError):
        return unavailable("the engine has stopped", "engine_dead", 5)
    error_id = secrets.token_hex(8)
    logger.error("internal error %s", error_id, exc_info=error)
    return ApiError("internal", f"internal error {error_id}")


def _from_request_error(error: RequestError) -> ApiError:
    is_too_long = isinstance(error, CapacityError) or "max_model_len" in error.limit
    message = f"{error.parameter} must be {error.limit}, got {shown(error.value)}"
    if error.hint:
        message += f" ({error.hint})"
    return bad_request(error.parameter, message, "context_length_exceeded" if is_too_long else None)
