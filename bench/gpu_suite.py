"""Runs the GPU suite and writes what it found as JSON: commit, GPU, software, counts, failures.

usage: python -m bench.gpu_suite OUT.json [--commit HASH] [pytest arguments]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any


def run_pytest(arguments: list[str], report: Path) -> int:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", *arguments]
    # Workers share the cores: with a pool of threads each, oracles on the CPU hold one another up for minutes.
    return subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode


def read_counts(report: Path) -> dict[str, Any]:
    """Counts and the names of failed cases of a JUnit file."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))

    def names(tag: str) -> list[str]:
        return [
            f"{case.get('classname')}::{case.get('name')}" for case in cases if case.find(tag) is not None
        ]

    failed, skipped = names("failure") + names("error"), names("skipped")
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": failed,
        "skips": skipped,
    }


def describe_machine() -> dict[str, str]:
    import torch

    import headway

    has_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "headway": headway.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--commit", default="unknown", help="of the tree under test, where git is not at hand"
    )
    args, pytest_arguments = parser.parse_known_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = run_pytest(pytest_arguments, report)
        counts = read_counts(report)
    result = {
        "commit": args.commit,
        **describe_machine(),
        "wall_s": round(time.monotonic() - started, 1),
        **counts,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        json.dumps({key: result[key] for key in ("commit", "gpu", "wall_s", "passed", "failed", "skipped")})
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
