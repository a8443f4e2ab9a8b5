"""Errors across a process's border: the kind by its name, the rest in words. Tracebacks stay where they arose."""

from __future__ import annotations

from headway.errors import (
    BuildError,
    CapacityError,
    ConfigError,
    EngineDeadError,
    HeadwayError,
    IntegrityError,
    MemoryBudgetError,
    ModelLoadError,
    OverloadedError,
    RequestError,
)
from headway.remote.messages import Fault

MAX_VALUE_CHARS = 400

_PLAIN_KINDS: dict[str, type[HeadwayError]] = {
    kind.__name__: kind
    for kind in (
        BuildError,
        ConfigError,
        EngineDeadError,
        HeadwayError,
        IntegrityError,
        MemoryBudgetError,
        ModelLoadError,
    )
}


class _Shown:
    """A value that is known by its spelling alone."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def to_fault(error: BaseException) -> Fault:
    """What is not of `headway.errors` is a `HeadwayError` that names its class."""
    if isinstance(error, RequestError):
        return Fault(
            type(error).__name__,
            str(error),
            error.hint,
            error.parameter,
            repr(error.value)[:MAX_VALUE_CHARS],
            error.limit,
        )
    if isinstance(error, OverloadedError):
        return Fault("OverloadedError", str(error), error.hint, retry_after_s=error.retry_after_s)
    if isinstance(error, HeadwayError):
        return Fault(type(error).__name__, str(error), error.hint)
    return Fault("HeadwayError", f"{type(error).__name__}: {error}")


def from_fault(fault: Fault) -> HeadwayError:
    """The error that `to_fault` was given, as far as words go."""
    if fault.kind in ("RequestError", "CapacityError"):
        kind = RequestError if fault.kind == "RequestError" else CapacityError
        return kind(fault.parameter, _Shown(fault.value), fault.limit, hint=fault.hint)
    if fault.kind == "OverloadedError":
        error: HeadwayError = OverloadedError(fault.message, retry_after_s=fault.retry_after_s)
    else:
        error = _PLAIN_KINDS.get(fault.kind, HeadwayError)(fault.message)
    error.hint = fault.hint
    return error
