"""Figures of the reliability rows, which long runs write to `bench/results/reliability.json`; readings of a process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.core.evidence import record as record_section

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "reliability.json"
SOURCES = ("csrc/core", "python/headway", "tests/server", "tests/core/fake_device.py")


def record(row: str, **figures: Any) -> None:
    """Under the row's name in docs/reliability.md, with the commit it was measured at."""
    record_section(row, figures, RESULTS, SOURCES)


def anonymous_bytes() -> int:
    """Of this process, in memory or swapped out: what files it maps does not count."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) for name in ("RssAnon", "VmSwap")) * 1024


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
