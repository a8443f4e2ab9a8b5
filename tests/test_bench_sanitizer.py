"""What compute-sanitizer is to run can be collected, as bench/sanitizer.py starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.sanitizer import PYTEST, TOOLS, shards_of
from bench.sanitizer_cases import CASES

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("cases", "is_whole"), [(CASES, True), ((*CASES[:2], CASES[2] + "x"), False)])
def test_every_case_is_found_by_the_command_of_the_sanitizers(cases: tuple[str, ...], is_whole: bool) -> None:
    command = [sys.executable, *PYTEST, "--collect-only", *cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == is_whole, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("tool", TOOLS)
def test_shards_are_all_cases_once(tool: str) -> None:
    assert sorted(case for shard in shards_of(tool) for case in shard) == sorted(CASES)
