"""Structured outputs beside the loop: masks are computed on worker threads while the device runs.

A row that waits for its mask is left out of steps, and nobody else waits for it (`Ledger.set_token_mask`). So a guided
row takes a step, skips those that were launched before its token was known, and takes the next.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from headway.engine.completion import Completion
from headway.errors import RequestError
from headway.sampling.grammar import GrammarCompiler, GrammarState
from headway.sampling.grammar_trial import GrammarError

if TYPE_CHECKING:
    from headway._core import Ledger

logger = logging.getLogger("headway")
MAX_WORKERS = 4
WAIT_S = 0.05  # of a loop that has nothing but held rows


class Guide:
    """One completion's grammar. Its next token is known only after its mask, so its tasks never overlap."""

    def __init__(self, state: GrammarState, completion: Completion, workers: MaskWorkers) -> None:
        self._state = state
        self._completion = completion
        self._workers = workers

    def begin(self) -> None:
        """Asks for the first mask. The completion is in the ledger."""
        self._workers.submit(self._completion, self._set_mask)

    def advance(self, token: int) -> None:
        """Asks for the mask after `token`, which was committed."""

        def consume() -> None:
            self._state.advance(token)
            self._set_mask()

        self._workers.submit(self._completion, consume)

    def _set_mask(self) -> None:
        request = self._completion.request
        num_tokens = len(request.prompt_token_ids) + len(self._completion.token_ids)
        self._workers.ledger.set_token_mask(self._completion.ledger_id, num_tokens, self._state.mask())


@dataclass(frozen=True, slots=True)
class Failure:
    """A completion that cannot go on, and what failed: `CompletionOutput.stop_reason`."""

    completion: Completion
    what: Literal["grammar", "internal"]


class MaskWorkers:
    """Compiles grammars and computes masks. No thread runs before a request needs one.

    Args:
        ledger: told the masks.
        compiler: None where the model has no tokenizer or no end token.
    """

    def __init__(self, ledger: Ledger, compiler: GrammarCompiler | None) -> None:
        self.ledger = ledger
        self._compiler = compiler
        self._pool: ThreadPoolExecutor | None = None
        self._news = threading.Event()
        self._failed: deque[Failure] = deque()
        self._tasks: deque[Future[None]] = deque()  # in the order of their coming; the first is not over

    def prepare(self) -> None:
        """Does beforehand what would hold up everybody at the first grammar."""
        if self._compiler is not None:
            self._compiler.prepare()

    def compile(self, form: Mapping[str, Any]) -> GrammarState:
        """Raises RequestError for a form that cannot be compiled here."""
        if self._compiler is None:
            kind = next(iter(form))
            raise RequestError("structured_outputs", kind, "unset for a model without tokenizer or end token")
        return self._compiler.start(form)

    def guide(self, completion: Completion, form: Mapping[str, Any]) -> Guide:
        return Guide(self.compile(form), completion, self)

    def submit(self, completion: Completion, task: Callable[[], None]) -> None:
        if self._pool is None:
            num_workers = min(MAX_WORKERS, max(1, (os.cpu_count() or 1) // 2))
            self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="headway-mask")
        self._forget_done()
        self._tasks.append(self._pool.submit(self._run, completion, task))

    def may_have_news(self) -> bool:
        """Whether a mask has come since the last `wait`, or may come: a row that a plan left out may be ready now."""
        self._forget_done()
        return bool(self._tasks) or self._news.is_set()

    def wait(self) -> None:
        """Returns when a mask has come since the last call, or after a while."""
        self._news.wait(WAIT_S)
        self._news.clear()

    def take_failed(self) -> list[Failure]:
        """Completions that get no further mask."""
        return [self._failed.popleft() for _ in range(len(self._failed))]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._compiler is not None:
            self._compiler.close()

    def _forget_done(self) -> None:
        while self._tasks and self._tasks[0].done():
            self._tasks.popleft()

    def _run(self, completion: Completion, task: Callable[[], None]) -> None:
        try:
            task()
        except (GrammarError, RequestError) as fault:
            logger.warning("request %s ended: its grammar: %s", completion.request.request_id, fault)
            self._failed.append(Failure(completion, "grammar"))
        except Exception:
            logger.exception("request %s ended: its mask cannot be computed", completion.request.request_id)
            self._failed.append(Failure(completion, "internal"))
        self._news.set()
