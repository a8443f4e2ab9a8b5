"""How much may wait, and for whom: counts of requests by key and of prompt tokens without an answer yet."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from headway.server.errors import ApiError, retry_after, unavailable
from headway.server.settings import ServerSettings

MAX_RETRY_AFTER_S = 60.0


@dataclass(eq=False, slots=True)
class Admission:
    """One admitted request. `started` when its first output has come: its prompt waits no longer."""

    _gate: Gate
    key_id: str
    num_waiting_tokens: int

    def started(self) -> None:
        self._gate.num_queued_tokens -= self.num_waiting_tokens
        self.num_waiting_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gate.leave(self)


class Gate:
    """Says yes, 429 (this key has too many) or 503 (too much waits). Completions that wait are the engine's count."""

    def __init__(self, settings: ServerSettings) -> None:
        self._max_tokens = settings.max_num_queued_tokens
        self._max_per_key = settings.max_num_reqs_per_key
        self._num_by_key: Counter[str] = Counter()
        self._mean_gap_s = 1.0  # between two requests that ended, smoothed
        self._last_end_s = time.monotonic()
        self.num_queued_tokens = 0
        self.num_requests = 0

    def admit(self, key_id: str, num_prompt_tokens: int) -> Admission:
        """To be entered at once, and left when the request is over. Raises ApiError with Retry-After."""
        self._check(key_id, num_prompt_tokens)
        admission = Admission(self, key_id, num_prompt_tokens)
        self.num_queued_tokens += num_prompt_tokens
        self.num_requests += 1
        self._num_by_key[key_id] += 1
        return admission

    def retry_after_s(self) -> float:
        """Until a place is free, going by how fast requests ended lately."""
        return min(MAX_RETRY_AFTER_S, max(1.0, self._mean_gap_s))

    def _check(self, key_id: str, num_prompt_tokens: int) -> None:
        if self._max_per_key is not None and self._num_by_key[key_id] >= self._max_per_key:
            message = f"this key has {self._max_per_key} requests open already (--max-num-reqs-per-key)"
            raise ApiError("rate_limited", message, headers=retry_after(self.retry_after_s()))
        is_empty = self.num_queued_tokens == 0  # one prompt larger than the limit may run alone
        if (
            self._max_tokens is not None
            and not is_empty
            and self.num_queued_tokens + num_prompt_tokens > self._max_tokens
        ):
            message = f"{self.num_queued_tokens} prompt tokens are waiting (--max-num-queued-tokens)"
            raise unavailable(message, "overloaded", self.retry_after_s())

    def leave(self, admission: Admission) -> None:
        admission.started()
        self.num_requests -= 1
        self._num_by_key[admission.key_id] -= 1
        if not self._num_by_key[admission.key_id]:
            del self._num_by_key[admission.key_id]
        now_s = time.monotonic()
        self._mean_gap_s += 0.1 * (now_s - self._last_end_s - self._mean_gap_s)
        self._last_end_s = now_s
