"""Ctrl-C between steps, never inside one: a step that is planned but not committed cannot be taken back."""

from __future__ import annotations

import signal
import threading

# What signal.signal wraps: looking each handler up in an enum takes it 6 us, twice a step.
from _signal import signal as set_handler  # type: ignore[import-not-found]
from collections.abc import Callable
from types import FrameType, TracebackType

_Handler = Callable[[int, FrameType | None], object] | int | None


class DeferInterrupt:
    """While entered on the main thread, SIGINT is noted; its own handler runs on leaving."""

    def __init__(self) -> None:
        self._previous: _Handler = None
        self._is_armed = False
        self._seen: FrameType | None = None
        self._is_pending = False

    def __enter__(self) -> DeferInterrupt:
        self._is_armed = threading.current_thread() is threading.main_thread()
        if self._is_armed:
            self._previous = set_handler(signal.SIGINT, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._is_pending, self._seen = True, frame

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_armed:
            return
        set_handler(
            signal.SIGINT, self._previous if self._previous is not None else signal.default_int_handler
        )
        if self._is_pending and callable(self._previous):
            self._is_pending = False
            self._previous(signal.SIGINT, self._seen)
