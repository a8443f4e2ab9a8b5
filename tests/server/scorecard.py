"""Figures of the reliability rows, which long runs write to `bench/results/reliability.json`; readings of a process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path
from typing import Any

from tests.core.evidence import record as record_section

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "reliability.json"
SOURCES = ("csrc/core", "python/headway", "tests/server", "tests/core/fake_device.py")


def record(row: str, **figures: Any) -> None:
    """Under the row's name in docs/reliability.md, with the commit it was measured at."""
    record_section(row, figures, RESULTS, SOURCES)


def held_bytes() -> int:
    """What this process holds, in memory or swapped out, but for what it maps of files.

    What Python and malloc keep for later is given back first: the rest is held by somebody.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) for name in ("RssAnon", "VmSwap")) * 1024


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
