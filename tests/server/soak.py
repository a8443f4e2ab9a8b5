"""Many short requests through the real desk, engine and ledger, in a process of its own whose memory is watched.

    python -m tests.server.soak NUM_REQUESTS LEAK_BYTES [http]

Of ten requests two are malformed and three are given up early. Prints one JSON object. LEAK_BYTES are kept for each
request that was right: whoever judges the figures must find them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import sys
import threading
import time
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

from headway.errors import RequestError
from headway.request import SamplingParams
from headway.server.client import EngineRequest
from tests.server.live import Live, live
from tests.server.scorecard import held_bytes, num_open_files
from tests.server.small_engine import SmallEngine
from tests.server.test_lifecycle import posted

NUM_AT_ONCE = 192
NUM_SAMPLES = 40
MALFORMED: list[dict[str, Any]] = [
    {"prompt": [-1]},
    {"prompt": []},
    {"prompt": [5] * 300},
    {"prompt": [5], "allowed_token_ids": [10**6]},
    {"prompt": [5], "logit_bias": {"99999999": 1.0}},
]


@dataclass
class Report:
    """Readings over time; `samples` are (requests so far, bytes)."""

    num_requests: int
    num_right: int = 0
    num_given_up: int = 0
    num_refused: int = 0
    samples: list[tuple[int, int]] = field(default_factory=list)
    open_files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    elapsed_s: float = 0.0

    def sample(self, num_done: int) -> None:
        self.samples.append((num_done, held_bytes()))
        self.open_files.append(num_open_files())
        self.threads.append(threading.active_count())


class Crowd:
    """Clients that take numbers until there are none left."""

    def __init__(self, report: Report, leak_bytes: int) -> None:
        self._report = report
        self._leak_bytes = leak_bytes
        self._kept: list[bytes] = []
        self._next = 0

    async def run(self, engine: SmallEngine, server: Live | None) -> None:
        """Phases with nobody at work in between, so that readings compare."""
        size = self._report.num_requests // NUM_SAMPLES
        for phase in range(1, NUM_SAMPLES + 1):
            await asyncio.gather(*(self._client(engine, server, phase * size) for _ in range(NUM_AT_ONCE)))
            self._report.sample(phase * size)

    async def _client(self, engine: SmallEngine, server: Live | None, end: int) -> None:
        while self._next < end:
            index, self._next = self._next, self._next + 1
            ask = self._over_http if server is not None else self._over_the_desk
            await ask(server or engine, index, random.Random(index))

    async def _over_the_desk(self, engine: Any, index: int, draws: random.Random) -> None:
        kind = draws.random()
        fields = draws.choice(MALFORMED) if kind < 0.2 else _right(draws)
        num_wanted = draws.randint(0, 2) if 0.2 <= kind < 0.5 else 1000
        rest = {name: value for name, value in fields.items() if name != "prompt"}
        try:
            params = SamplingParams(ignore_eos=True, detokenize=False, **rest)
            asked = EngineRequest(str(index), fields["prompt"], params)
            async with aclosing(engine.stream(asked)) as outputs:
                num_seen = 0
                async for _ in outputs:
                    num_seen += 1
                    if num_seen > num_wanted:
                        break
            self._note(is_given_up=num_wanted < 1000)
        except RequestError:
            self._report.num_refused += 1

    async def _over_http(self, server: Any, index: int, draws: random.Random) -> None:
        kind = draws.random()
        body = draws.choice(MALFORMED) if kind < 0.2 else {**_right(draws), "stream": draws.random() < 0.5}
        reader, writer = await asyncio.open_connection(server.host, server.port)
        with contextlib.suppress(ConnectionError):
            writer.write(posted({"ignore_eos": True, **body}))
            if 0.2 <= kind < 0.5:
                await reader.read(draws.choice([1, 200, 400]))
                self._note(is_given_up=True)
            elif (await reader.read()).startswith(b"HTTP/1.1 200"):
                self._note(is_given_up=False)
            else:
                self._report.num_refused += 1
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    def _note(self, *, is_given_up: bool) -> None:
        self._report.num_given_up += is_given_up
        self._report.num_right += not is_given_up
        if self._leak_bytes:
            self._kept.append(bytes(self._leak_bytes))


def _right(draws: random.Random) -> dict[str, Any]:
    prompt = [5 + draws.randrange(1000) for _ in range(draws.randint(1, 6))]
    return {"prompt": prompt, "max_tokens": draws.randint(1, 4), "n": 1 + (draws.random() < 0.1)}


def soak(num_requests: int, leak_bytes: int, *, is_http: bool) -> Report:
    report = Report(num_requests)
    crowd = Crowd(report, leak_bytes)
    begin_s = time.perf_counter()
    gc.freeze()  # what was imported is never collected, and need not be looked through
    engine = SmallEngine(max_rows=64, step_s=0.001)  # so that requests gather for a step
    if is_http:
        with live(engine) as server:
            asyncio.run(crowd.run(engine, server))
            _wait_until_empty(engine)
    else:

        async def main() -> None:
            async with engine:
                await crowd.run(engine, None)
                _wait_until_empty(engine)

        asyncio.run(main())
    report.elapsed_s = time.perf_counter() - begin_s
    return report


def _wait_until_empty(engine: SmallEngine) -> None:
    deadline_s = time.monotonic() + 10
    while engine.ledger.has_unfinished or engine.ledger.num_in_flight:
        assert time.monotonic() < deadline_s, "requests are left"
        time.sleep(0.01)
    engine.check_empty()


if __name__ == "__main__":
    num, leak, *more = sys.argv[1:]
    print(json.dumps(asdict(soak(int(num), int(leak), is_http=more == ["http"]))))
