"""Every error Headway raises on purpose.

HeadwayError
  RequestError (ValueError)    a request's parameter is out of range: parameter, value, limit
    CapacityError              it could never fit: names the setting to change
  ConfigError (ValueError)     an engine setting or flag is wrong
  ModelLoadError               a checkpoint is missing, unsupported or misshapen
  MemoryBudgetError            weights and caches do not fit the device
  ArgumentError (ValueError)   an op was called with what its kernel does not take
  BuildError (ImportError)     the compiled modules are missing or unusable here
  OverloadedError              too many requests wait: try again later
  ServerError                  a server that was asked gave no answer, or an error
  EngineDeadError              the engine stopped after a fault and takes no more requests
  IntegrityError               our own bug: a bookkeeping invariant is broken
"""

from __future__ import annotations


class HeadwayError(Exception):
    """Base of all errors raised on purpose. `hint` is one line that says what to do, or empty."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.hint = hint


class RequestError(HeadwayError, ValueError):
    """A request cannot be served as asked. Other requests are not affected.

    Attributes:
        parameter: the name the caller used.
        value: what was passed.
        limit: the accepted range, in words.
    """

    def __init__(self, parameter: str, value: object, limit: str, *, hint: str = "") -> None:
        super().__init__(f"{parameter} must be {limit}, got {value!r}", hint=hint)
        self.parameter = parameter
        self.value = value
        self.limit = limit


class CapacityError(RequestError):
    """The request is valid but larger than this engine can ever hold."""


class ConfigError(HeadwayError, ValueError):
    """An engine setting is unknown or out of range."""


class ModelLoadError(HeadwayError):
    """A checkpoint cannot be loaded: a file, key or tensor is missing, extra, unsupported or misshapen."""


class MemoryBudgetError(HeadwayError):
    """Weights, KV blocks and state slots do not fit the memory given."""


class ArgumentError(HeadwayError, ValueError):
    """An op cannot take an argument. The message has the op, the argument, what it must be and what it is; nothing has
    been launched.
    """


class BuildError(HeadwayError, ImportError):
    """A compiled module is missing or does not run here."""


class OverloadedError(HeadwayError):
    """Too many requests wait already; nothing is wrong with this one.

    Attributes:
        retry_after_s: when it may be worth trying again.
    """

    def __init__(self, message: str, *, retry_after_s: float, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class ServerError(HeadwayError):
    """Another process, which was asked over HTTP, gave no answer or an error."""


class EngineDeadError(HeadwayError):
    """The engine stopped after a device fault; the cause is chained."""


class IntegrityError(HeadwayError):
    """A bookkeeping invariant is broken; please report it."""
