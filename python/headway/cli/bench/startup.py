"""`headway bench startup`: how long a process takes until its engine is ready, with cold files and with warm ones.

Nothing is compiled at run time, so cold and warm differ by the files alone: before a cold start the system is told to
forget what it holds of the checkpoint. CUDA graphs recorded at start-up are part of both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from headway.cli.bench.common import CountFlag, add_counts, percentiles, write_report
from headway.cli.flags import add_engine_flags, given_settings
from headway.config import EngineConfig
from headway.errors import HeadwayError

# Prints how long the constructor took; the settings come on stdin.
PROBE = """
import json, sys, time
settings = json.load(sys.stdin)
from headway import LLM
from headway.errors import HeadwayError
begin_s = time.perf_counter()
try:
    llm = LLM(settings.pop("model", None), **settings)
except HeadwayError as error:
    sys.exit(f"headway: error: {error}")
print(time.perf_counter() - begin_s, flush=True)
llm.close()
"""


def add_to(kinds: Any, *, shows_all: bool) -> None:
    parser = kinds.add_parser(
        "startup",
        help="from a new process to a model that is ready",
        description="Starts the engine in new processes: the checkpoint's files first cold, then warm.",
    )
    add_counts(
        parser,
        CountFlag("--num-iters-cold", 1, 3, "starts with cold files"),
        CountFlag("--num-iters-warmup", 0, 1, "starts before the warm ones"),
        CountFlag("--num-iters-warm", 1, 3, "starts with warm files"),
    )
    parser.add_argument("--output-json", metavar="FILE", help="write the report here too")
    add_engine_flags(parser, shows_all=shows_all)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    settings = given_settings(args)
    EngineConfig(**settings)  # refuse bad values before a process is started
    cold = []
    for _ in range(args.num_iters_cold):
        forget_files(settings.get("model"))
        cold.append(start(settings))
    for _ in range(args.num_iters_warmup):
        start(settings)
    warm = [start(settings) for _ in range(args.num_iters_warm)]
    write_report(_figures("cold", cold) | _figures("warm", warm), args.output_json)
    return 0


def start(settings: dict[str, Any]) -> tuple[float, float]:
    """Seconds of the engine's constructor, and of the whole process until it was ready."""
    begin_s = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", PROBE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(settings))
        process.stdin.close()
        line = process.stdout.readline()
        ready_s = time.perf_counter() - begin_s
    if not line or process.returncode:
        raise HeadwayError(f"the engine did not start: its process ended with code {process.returncode}")
    return float(line), ready_s


def forget_files(model: str | None) -> None:
    """Tells the system that the checkpoint's pages are not needed; it drops those that nobody else has mapped."""
    if model is None or not Path(model).is_dir():
        return
    for path in Path(model).iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _figures(phase: str, starts: list[tuple[float, float]]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name, times in zip(("startup", "process"), zip(*starts, strict=True), strict=True):
        report[f"avg_{phase}_{name}_time"] = statistics.fmean(times)
        report[f"{phase}_{name}_times"] = list(times)
        report[f"{phase}_{name}_percentiles"] = percentiles(times)
    return report
