"""Ways to wait for a step's results, as `collect` of an engine's stages. What each is for: bench/host_time.py."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from headway.engine.engine import Engine

EVICTING_BYTES = 1 << 28  # more than any cache holds
QUIET_NS = 300_000  # before the end that is expected

IsReady = Callable[[], bool]
Collect = Callable[[IsReady], None]


def nap(_: Engine) -> Collect:
    """As the engine does."""

    def wait(is_ready: IsReady) -> None:
        while not is_ready():
            time.sleep(0)

    return wait


def spin(_: Engine) -> Collect:
    def wait(is_ready: IsReady) -> None:
        while not is_ready():
            pass

    return wait


def quiet(_: Engine) -> Collect:
    lasted_ns = deque([0] * 4, maxlen=4)

    def wait(is_ready: IsReady) -> None:
        begin_ns = time.perf_counter_ns()
        time.sleep(max(0, min(lasted_ns) - QUIET_NS) / 1e9)
        while not is_ready():
            time.sleep(0)
        lasted_ns.append(time.perf_counter_ns() - begin_ns)

    return wait


def touch(engine: Engine) -> Collect:
    runner, live = engine._runner, engine._outputs._live

    def wait(is_ready: IsReady) -> None:
        while not is_ready():
            time.sleep(0)
            for completion in live.values():
                len(completion.token_ids)
            engine.ledger.stats()
            runner.staging.run(bool)

    return wait


def evict(engine: Engine) -> Collect:
    memory, look = np.ones(EVICTING_BYTES // 8), spin(engine)

    def wait(is_ready: IsReady) -> None:
        memory.sum()
        look(is_ready)

    return wait


WAITS: dict[str, Callable[[Engine], Collect]] = {
    "nap": nap,
    "quiet": quiet,
    "spin": spin,
    "touch": touch,
    "evict": evict,
}
