"""The compiled bookkeeping core with our exception types installed, and a readable error when it is missing."""

from __future__ import annotations

from headway.errors import BuildError, CapacityError, IntegrityError, RequestError

try:
    from headway import _core as core
except ImportError as cause:
    raise BuildError(
        f"the compiled module headway._core cannot be imported: {cause}",
        hint="run `pip install .` in the source tree",
    ) from cause

core.set_error_types(RequestError, CapacityError, IntegrityError)

__all__ = ["core"]
