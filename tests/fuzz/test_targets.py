"""Whatever bytes come: an error of ours or none. Briefly with the seeds and damaged ones, at length by coverage."""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("msgspec", reason="the extra serve is not installed")

from tests.fuzz.targets import NAMES, planted, targets
from tests.models.hostile import changed
from tests.server.scorecard import record

LIMITS = ("-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1")
needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed"
)


def fuzz(name: str, seconds: int, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz.run", name, f"-max_total_time={seconds}", *LIMITS]
    command.append(f"-artifact_prefix={folder}/")
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_seeds_are_read_or_refused(name: str, tmp_path: Path) -> None:
    found, draws = targets(tmp_path), random.Random(1)
    assert set(found) == set(NAMES)
    target = found[name]
    for seed in target.seeds:
        target.run(seed)
        for _ in range(200):
            target.run(changed(seed, draws)[: target.max_bytes])


@needs_atheris
@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_minute_of_guided_fuzzing_finds_nothing(name: str, tmp_path: Path) -> None:
    done = fuzz(name, 60, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    num_inputs = int(re.findall(r"number_of_executed_units:\s*(\d+)", done.stderr)[-1])
    first, *_, last = map(int, re.findall(r"\bcov: (\d+)", done.stderr))
    assert num_inputs > 1000
    record(
        f"F1 guided fuzzing, {name}",
        num_inputs=num_inputs,
        num_edges_of_seeds=first,
        num_edges=last,
        num_findings=0,
    )


@needs_atheris
@pytest.mark.long
def test_a_reader_that_trusts_its_input_is_found(tmp_path: Path) -> None:
    done = fuzz("planted", 60, tmp_path)
    assert done.returncode != 0
    assert "IndexError: planted" in done.stdout + done.stderr
    (found,) = tmp_path.iterdir()
    with pytest.raises(IndexError):
        planted(found.read_bytes())
