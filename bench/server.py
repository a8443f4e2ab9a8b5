"""What HTTP costs: the server around an engine that says letters, in a process of its own, under closed-loop load.

    python -m bench.server [--runs 4] [--seconds 5] [--connections 64] [--streams 256]

Three parts: short requests on kept connections, streams of one event a token, and /health beside the streams. Besides
what was reached here, the report has the processor's time of the server's, the engine's and the load's process for each
request and event: the inverse is what one core of theirs carries, whatever else the machine does. Of several runs the
report has each, and for each part the best: other tenants of a machine take away and never add.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.http_load import HealthWatch, for_seconds, request_bytes, send_all
from headway import __version__
from tests.core.evidence import commit_id
from tests.remote.serving import Serving, serving

RESULTS = Path(__file__).parent / "results"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
NUM_SHORT_TOKENS = 4
PROMPT = "def f(x):"


@dataclass(frozen=True)
class Cost:
    """Of a stretch of time: how much was answered, and what the three processes paid."""

    count: int
    wall_s: float
    server_s: float
    engine_s: float
    load_s: float

    def report(self, name: str) -> dict[str, float]:
        return {
            f"{name}_a_second": round(self.count / self.wall_s),
            f"server_us_a_{name[:-1]}": round(1e6 * self.server_s / self.count, 1),
            f"engine_us_a_{name[:-1]}": round(1e6 * self.engine_s / self.count, 1),
            f"load_us_a_{name[:-1]}": round(1e6 * self.load_s / self.count, 1),
            "load_cores": round(self.load_s / self.wall_s, 2),
            f"{name}_a_second_of_a_server_core": round(self.count / self.server_s),
        }


def processor_s(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS_PER_S


def measured(server: Serving, work: Callable[[], int]) -> Cost:
    pids = server.process.pid, server.engine_pid
    before = [processor_s(pid) for pid in pids]
    begin_s, load_begin_s = time.perf_counter(), time.process_time()
    count = work()
    wall_s, load_s = time.perf_counter() - begin_s, time.process_time() - load_begin_s
    after = [processor_s(pid) for pid in pids]
    return Cost(count, wall_s, after[0] - before[0], after[1] - before[1], load_s)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=2.0, help="of the engine, while streams run")
    parser.add_argument("--output-json", default=str(RESULTS / "server.json"))
    args = parser.parse_args()
    runs = [
        {**short_report(args), **stream_report(args), "load_average": os.getloadavg()[0]}
        for _ in range(args.runs)
    ]
    report = {**best_of(runs), "runs": runs}
    load = {name: value for name, value in vars(args).items() if name != "output_json"}
    commit = commit_id(("python/headway", "bench/server.py"))
    report |= {"commit": commit, "num_cores": os.cpu_count(), "versions": {"headway": __version__}}
    report["arguments"] = load
    Path(args.output_json).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output_json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


def best_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each part by itself."""
    return {
        "short": max((run["short"] for run in runs), key=lambda found: found["requests_a_second"]),
        "streams": max((run["streams"] for run in runs), key=lambda found: found["events_a_second"]),
        "health_ms": min((run["health_ms"] for run in runs), key=lambda found: found["median"]),
    }


def short_report(args: argparse.Namespace) -> dict[str, Any]:
    request = request_bytes({"prompt": PROMPT, "max_tokens": NUM_SHORT_TOKENS})

    def work(seconds: float) -> int:
        answered = send_all(server.port, args.connections, for_seconds(request, seconds))
        assert set(answered.times_s) == {200}, answered.times_s.keys()
        return answered.num_replies

    with serving({}) as server:
        work(0.5)
        cost = measured(server, lambda: work(args.seconds))
    return {"short": cost.report("requests")}


def stream_report(args: argparse.Namespace) -> dict[str, Any]:
    request = request_bytes({"prompt": PROMPT, "max_tokens": args.tokens, "stream": True})
    requests = [request] * args.streams
    with serving({"step_s": args.step_ms / 1e3}) as server:
        watch = HealthWatch(server.port)
        cost = measured(server, lambda: send_all(server.port, args.streams, requests).num_events)
        times = watch.end()
    health = {
        "median": statistics.median(times),
        "p99": times[int(0.99 * (len(times) - 1))],
        "num": len(times),
    }
    num_tokens = args.streams * args.tokens
    return {
        "streams": {**cost.report("events"), "tokens_an_event": round(num_tokens / cost.count, 2)},
        "health_ms": {name: round(value, 2) for name, value in health.items()},
    }


if __name__ == "__main__":
    main()
