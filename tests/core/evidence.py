"""Writes what the long runs measured to `bench/results/core_evidence.json`."""

from __future__ import annotations

import fcntl
import json
import platform
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.core import native

COMPILED = ["csrc/core", "csrc/params", "csrc/tests", "csrc/cpu/begin_step.cpp", "csrc/cpu/finish_step.cpp"]
ENGINE = [*COMPILED, "python/headway", "tests/engine"]
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
    with document(path) as sections:
        sections[section] = header(sources) | figures


def record_shard(
    section: str,
    shard: int,
    num_shards: int,
    counts: Mapping[str, int],
    path: Path = RESULTS,
    sources: Sequence[str] = COMPILED,
) -> Counter[str] | None:
    """Adds one process's part of a run that several share, under a lock.

    Parts of another commit, or of a run with another number of shards, are dropped. Returns the sums once every shard
    is there, so that whoever ends last can judge the whole.
    """
    with document(path) as sections:
        found = sections.get(section, {})
        run = header(sources) | {"num_shards": num_shards}
        is_same_run = all(found.get(name) == value for name, value in run.items())
        shards: dict[str, dict[str, int]] = found["shards"] if is_same_run else {}
        shards[str(shard)] = dict(counts)
        total = sum((Counter(part) for part in shards.values()), Counter[str]())
        sections[section] = run | {"num_shards_done": len(shards), "total": dict(total), "shards": shards}
    return total if len(shards) == num_shards else None


def header(sources: Sequence[str]) -> dict[str, Any]:
    return {"commit": commit_id(sources), "processor": platform.machine()}


@contextmanager
def document(path: Path) -> Iterator[dict[str, Any]]:
    """The file's sections, to be changed by one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        sections = json.loads(text) if text else {}
        yield sections
        file.seek(0)
        file.truncate()
        file.write(json.dumps(sections, indent=2, sort_keys=True) + "\n")
