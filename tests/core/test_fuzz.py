"""The ledger under random operations and random traces, in C++: `csrc/tests/fuzz` and `csrc/tests/sim`.

The programs check everything themselves; here they are built, run, and asked whether they reached what they are about.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.core import evidence, native
from tests.core.native import FAST, FUZZ, SANITIZED, SIM, THREAD_SANITIZED, Program

VARIANTS = {"plain": FAST, "address,undefined": SANITIZED}
CONTRACT = "Not thread-safe; the binding serialises callers."


def figures(program: Path, *arguments: str | int, timeout_s: float = 3000) -> dict[str, Any]:
    done = native.run(program, *arguments, timeout_s=timeout_s)
    assert done.returncode == 0, (
        f"{' '.join(map(str, arguments))}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def assert_all_happened(counts: dict[str, Any], per_million: float) -> None:
    """Nothing that the run is about was left out: every count is there, and not by a whisker."""
    for name, count in counts.items():
        if isinstance(count, dict):
            assert_all_happened(count, per_million)
        else:
            assert count > per_million, f"{name}: {counts}"


def fuzz(tmp_path: Path, variant: str, num_ops: int, seed: int) -> dict[str, Any]:
    program = Program(FUZZ, VARIANTS[variant]).build(tmp_path / "fuzz")
    counts = figures(program, "--ops", num_ops, "--seed", seed)
    assert counts["ops"] >= num_ops
    assert_all_happened(counts, num_ops * 1e-4)
    return counts


def simulate(tmp_path: Path, variant: str, num_traces: int, seed: int) -> dict[str, Any]:
    program = Program(SIM, VARIANTS[variant]).build(tmp_path / "sim")
    counts = figures(program, "--traces", num_traces, "--seed", seed)
    assert counts["traces"] == num_traces
    assert min(counts["traces_by_depth"]) > num_traces / 8
    host = counts.pop("host")  # few prompts of a short trace come back after they left the device
    assert_all_happened(host, num_traces / 200)
    assert_all_happened({k: v for k, v in counts.items() if k != "traces_by_depth"}, num_traces / 20)
    return counts


def race(tmp_path: Path, num_traces: int, seed: int) -> dict[str, Any]:
    program = Program(SIM, THREAD_SANITIZED).build(tmp_path / "race")
    counts = figures(program, "--threads", 1, "--traces", num_traces, "--seed", seed)
    assert_all_happened(counts["host"], num_traces / 200)
    return counts


def test_random_operations(tmp_path: Path) -> None:
    """Address and undefined-behaviour sanitizers have an act of their own in `.ci/run`, and the long run."""
    fuzz(tmp_path, "plain", 1_000_000, seed=1)


def test_random_traces_equal_a_serial_run(tmp_path: Path) -> None:
    simulate(tmp_path, "plain", 1000, seed=1)


def test_no_thread_races_another(tmp_path: Path) -> None:
    """The rings and the records that move between threads, and the ledger behind a lock: the thread sanitizer."""
    assert race(tmp_path, 100, seed=1)["traces"] == 100


def test_an_episode_can_be_run_again(tmp_path: Path) -> None:
    program = Program(FUZZ, FAST).build(tmp_path / "fuzz")
    first, second = (figures(program, "--episode", 77) for _ in range(2))
    assert {**first, "ops_per_cpu_s": 0} == {**second, "ops_per_cpu_s": 0}
    assert first["episodes"] == 1
    assert native.run(program, "--episodes", 1).returncode == 2


def test_the_threading_contract_is_stated() -> None:
    """The ledger takes one caller at a time, says so, and the binding sees to it."""
    assert CONTRACT in (native.CSRC / "core" / "ledger.h").read_text().replace("\n// ", " ")
    binding = (native.CSRC / "bind" / "core_module.cpp").read_text()
    assert "std::lock_guard lock(mutex_)" in binding


@pytest.mark.long
@pytest.mark.parametrize(("variant", "num_ops"), [("plain", 20_000_000), ("address,undefined", 5_000_000)])
def test_random_operations_at_length(tmp_path: Path, variant: str, num_ops: int) -> None:
    evidence.record(f"random operations, {variant}", fuzz(tmp_path, variant, num_ops, seed=2))


@pytest.mark.long
@pytest.mark.parametrize(("variant", "num_traces"), [("plain", 20_000), ("address,undefined", 2_000)])
def test_random_traces_at_length(tmp_path: Path, variant: str, num_traces: int) -> None:
    evidence.record(f"random traces, {variant}", simulate(tmp_path, variant, num_traces, seed=1_000_000))


@pytest.mark.long
def test_races_at_length(tmp_path: Path) -> None:
    evidence.record("random traces on threads, thread sanitizer", race(tmp_path, 2_000, seed=1_000_000))
