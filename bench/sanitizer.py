"""Our CUDA kernels under compute-sanitizer: memcheck, racecheck and initcheck over small cases of the test suite, and a
planted fault for each tool, which must be found.

usage: python -m bench.sanitizer OUT.json [--commit HASH] [--tools memcheck racecheck initcheck]

Exit status 0: every case is clean and every planted fault was found. Needs a GPU, compute-sanitizer and nvcc.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.gpu_suite import describe_machine
from bench.sanitizer_cases import CASES

TOOLS = ("memcheck", "racecheck", "initcheck")
NUM_SHARDS = {
    "memcheck": 2,
    "racecheck": 6,
    "initcheck": 2,
}  # racecheck takes three times as long as the others
OURS = "headway::cuda::"
# racecheck looks at shared memory alone; what another kernel wrote must be seen by initcheck
ONLY_OURS = {"memcheck", "racecheck"}
PADDING_BYTES = 4096  # behind each allocation, so that what lies beyond it is nobody's
REPORT = re.compile(  # pytest's dots may come before
    r"={9} (?:Error: )?(?P<what>Invalid .*|Uninitialized .*|Misaligned .*|(?:Potential )?(?:RAW|WAR|WAW) hazard.*"
    r"|Race reported between.*|Warp hazard.*|Program hit.*)$"
)
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout", "0", "-m", "gpu"]


def run(tool: str, command: Sequence[str]) -> tuple[int, list[str]]:
    """Exit status and output of the command under the tool."""
    only = ["--kernel-name", "kns=headway"] if tool in ONLY_OURS else []
    # one cudaMalloc a tensor: a caching allocator would hide what lies beyond it
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    padding = ["--padding", str(PADDING_BYTES)] if tool == "memcheck" else []
    sanitizer = ["compute-sanitizer", "--tool", tool, "--print-limit", "300", *only, *padding]
    done = subprocess.run(
        [*sanitizer, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables
    )
    return done.returncode, done.stdout.splitlines()


def read_reports(lines: Sequence[str]) -> Counter[str]:
    """What the tool says of our kernels, by kind and kernel; of others (comparisons of results) nothing."""
    found: Counter[str] = Counter()
    for index, line in enumerate(lines):
        report = REPORT.search(line)
        if report is None:
            continue
        place = line if OURS in line else lines[index + 1] if index + 1 < len(lines) else ""
        if OURS in place:
            kernel = re.sub(r"<unnamed>::|\(anonymous namespace\)::", "", place.split(OURS, 1)[1])
            found[f"{report['what'].split(' at ')[0]}: {re.split('[<(]', kernel)[0]}"] += 1
    return found


def check_cases(tool: str, cases: Sequence[str], log: Path) -> dict[str, Any]:
    started = time.monotonic()
    status, lines = run(tool, [sys.executable, *PYTEST, *cases])
    log.write_text("\n".join(lines))
    summary = next((line for line in reversed(lines) if " passed" in line or " failed" in line), "")
    return {
        "num_cases": len(cases),
        "pytest_status": status,
        "pytest": re.sub(r" in [\d.]+s.*", "", summary.strip("= ")),
        "reports": dict(read_reports(lines)),
        "tool_summary": [line.strip("= ") for line in lines if "SUMMARY" in line],
        "wall_s": round(time.monotonic() - started, 1),
    }


def shards_of(tool: str) -> list[Sequence[str]]:
    """The cases in as many processes as the tool takes; neighbours, which cost alike, in different ones."""
    num_shards = NUM_SHARDS[tool]
    return [CASES[first::num_shards] for first in range(num_shards)]


def find_planted(tool: str, folder: Path) -> dict[str, Any]:
    """Whether the tool finds a fault that is there."""
    command = [sys.executable, "-m", "tests.ops.planted_faults", tool]
    if tool == "racecheck":
        program = folder / "planted_race"
        subprocess.run(["nvcc", "-o", str(program), "tests/ops/planted_race.cu"], check=True)
        command = [str(program)]
    _, lines = run(tool, command)
    return {
        "reports": dict(read_reports(lines)),
        "tool_summary": [line.strip("= ") for line in lines if "SUMMARY" in line],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", default="unknown", help="of the tree under test")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--logs", type=Path, help="folder for the tools' whole output")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2 * sum(NUM_SHARDS.values())) as pool:
        folder = args.logs or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        cases = {
            tool: [
                pool.submit(check_cases, tool, shard, folder / f"{tool}_{index}.log")
                for index, shard in enumerate(shards_of(tool))
            ]
            for tool in args.tools
        }
        planted = {tool: pool.submit(find_planted, tool, Path(name)) for tool in args.tools}
        result = {
            "commit": args.commit,
            **describe_machine(),
            "num_cases": len(CASES),
            "cases": {tool: [job.result() for job in jobs] for tool, jobs in cases.items()},
            "planted": {tool: job.result() for tool, job in planted.items()},
        }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    shards = [shard for shards in result["cases"].values() for shard in shards]
    are_clean = all(not shard["reports"] and shard["pytest_status"] == 0 for shard in shards)
    are_found = all(fault["reports"] for fault in result["planted"].values())
    print(json.dumps({"are_clean": are_clean, "are_found": are_found, **result["cases"]}, indent=1))
    return 0 if are_clean and are_found else 1


if __name__ == "__main__":
    sys.exit(main())
