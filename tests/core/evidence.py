"""Writes what the long runs measured to `bench/results/core_evidence.json`."""

from __future__ import annotations

import fcntl
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.core import native

COMPILED = ["csrc/core", "csrc/params", "csrc/tests", "csrc/cpu/begin_step.cpp", "csrc/cpu/finish_step.cpp"]
RESULTS = native.ROOT / "bench" / "results" / "core_evidence.json"


def commit_id(sources: Sequence[str] = COMPILED) -> str:
    """HEAD, marked where one of the sources differs from it; "unknown" outside a repository."""
    command = ["git", "-C", str(native.ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return "unknown"
    changed = ["git", "-C", str(native.ROOT), "status", "--porcelain", "--", *sources]
    is_changed = subprocess.run(changed, capture_output=True, text=True, check=False).stdout.strip()
    return done.stdout.strip() + ("-changed" if is_changed else "")


def record(
    section: str, figures: dict[str, Any], path: Path = RESULTS, sources: Sequence[str] = COMPILED
) -> None:
    """Replaces one section of the file; several processes may write at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        document = json.loads(text) if text else {}
        document[section] = {"commit": commit_id(sources), "processor": platform.machine(), **figures}
        file.seek(0)
        file.truncate()
        file.write(json.dumps(document, indent=2, sort_keys=True) + "\n")
