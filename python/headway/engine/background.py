"""An engine on a thread of its own: it steps while there is work, and does between steps what other threads ask for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from headway.engine.completion import Completion
from headway.engine.engine import Engine
from headway.engine.meter import StepMeter
from headway.errors import EngineDeadError

Action = Callable[[], None]


class EngineThread:
    """From its start on, nobody but its thread may touch the engine, until `stop` has returned.

    Args:
        on_change: called after a step, on the thread, with the completions that changed.
        on_death: called last, on the thread, when a step or an action has failed.
    """

    def __init__(
        self,
        engine: Engine,
        meter: StepMeter,
        on_change: Callable[[list[Completion]], None],
        on_death: Callable[[EngineDeadError], None],
    ) -> None:
        self._engine = engine
        self._meter = meter
        self._on_change = on_change
        self._on_death = on_death
        self._inbox: deque[Action] = deque()
        self._news = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="headway-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, action: Action) -> None:
        """Runs `action` on the thread, before its next step; never, once the thread has ended."""
        with self._news:
            self._inbox.append(action)
            self._news.notify()

    def stop(self) -> None:
        """Returns when the step that runs is over. Legal twice."""
        with self._news:
            self._is_stopping = True
            self._news.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._prepare_step():
                changed = self._engine.step()
                if changed:
                    self._on_change(changed)
        except EngineDeadError as fault:
            self._on_death(fault)
        except Exception as fault:  # of an action or a callback: our own bug
            death = EngineDeadError(f"the engine's thread stopped: {fault}", hint="create a new engine")
            death.__cause__ = fault
            self._on_death(death)

    def _prepare_step(self) -> bool:
        """Does what was asked for, and waits while there is nothing to step for; False: stop."""
        while True:
            while self._inbox:
                self._inbox.popleft()()
            if self._is_stopping:
                return False
            if self._engine.num_unfinished:
                return True
            self._meter.rest()
            with self._news:
                self._news.wait_for(lambda: self._inbox or self._is_stopping)
