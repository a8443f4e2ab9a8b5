"""Do the fuzzer, the simulation and the checks find bugs? Each mutant of `mutants.toml` breaks a line of csrc/core."""

from __future__ import annotations

import subprocess
import time
import tomllib
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.core import evidence, native
from tests.core.native import CHECKS, CSRC, FUZZ, QUICK, SANITIZED, SIM, Program

REQUIRED_SCORE = 0.95
NUM_OF_THE_DAY = 4
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Mutant:
    """One wrong line. `survives` is empty, or says why no test can see it."""

    name: str
    file: str
    original: str
    replacement: str
    breaks: str
    source: str
    survives: str = ""

    def overlay(self) -> dict[str, str]:
        text = (CSRC / self.file).read_text()
        assert text.count(self.original) == 1, f"{self.name}: its original is not once in {self.file}"
        return {self.file: text.replace(self.original, self.replacement)}


@dataclass(frozen=True)
class Hunt:
    """One way to look for a bug."""

    name: str
    program: Program
    arguments: tuple[str | int, ...]


HUNTS = [
    Hunt("random operations", Program(FUZZ, QUICK), ("--ops", 300_000)),
    Hunt("random traces", Program(SIM, QUICK), ("--traces", 3_000)),
    Hunt("checks", Program(CHECKS, QUICK), ()),
    Hunt("random operations, another seed", Program(FUZZ, QUICK), ("--ops", 600_000, "--seed", 11)),
    Hunt("random operations, sanitized", Program(FUZZ, SANITIZED), ("--ops", 50_000)),
]
# What the device, the client and the policy see by themselves, with check_integrity() never called.
BLIND = [
    Hunt(
        "random operations, integrity unchecked", Program(FUZZ, QUICK), ("--ops", 300_000, "--check-every", 0)
    )
]
MUTANTS = [
    Mutant(**entry) for entry in tomllib.loads(Path(__file__).with_name("mutants.toml").read_text())["mutant"]
]
SCORED = [mutant for mutant in MUTANTS if not mutant.survives]


def killer(mutant: Mutant, folder: Path, hunts: list[Hunt] = HUNTS) -> str:
    """What found the mutant; empty when nothing did."""
    for hunt in hunts:
        program = hunt.program.build(folder / "program", mutant.overlay())
        try:
            done = native.run(program, *hunt.arguments, timeout_s=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"{hunt.name}: hangs"
        if done.returncode != 0:
            lines = done.stdout.strip().splitlines() or ["crashed"]
            return f"{hunt.name}: {next((line for line in lines if line.startswith('FAILED')), lines[-1])}"
    return ""


def of_the_day() -> list[Mutant]:
    """A few, others every day, so that all are tried in the long run."""
    first = date.today().toordinal() * NUM_OF_THE_DAY
    return [SCORED[(first + i) % len(SCORED)] for i in range(NUM_OF_THE_DAY)]


def test_the_list_is_sound() -> None:
    """Every original is still there, once, and every mutant says what it breaks."""
    assert len(SCORED) >= 16
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert mutant.overlay()[mutant.file] != (CSRC / mutant.file).read_text(), mutant.name
        assert all((mutant.breaks, mutant.source)), mutant.name


def test_an_unbroken_core_is_not_killed(tmp_path: Path) -> None:
    """The hunts cry wolf at wolves alone."""
    unbroken = Mutant("none", "core/ledger.h", "class Ledger {", "class Ledger {", "nothing", "none")
    assert killer(unbroken, tmp_path, HUNTS[:3]) == ""


@pytest.mark.parametrize("index", range(NUM_OF_THE_DAY))
def test_a_mutant_is_killed(tmp_path: Path, index: int) -> None:
    mutant = of_the_day()[index]
    assert killer(mutant, tmp_path), f"{mutant.name} lives: {mutant.breaks}"


@pytest.mark.long
def test_mutation_score(tmp_path: Path) -> None:
    killers: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for mutant in MUTANTS:
        begin = time.monotonic()
        killers[mutant.name] = killer(mutant, tmp_path)
        seconds[mutant.name] = round(time.monotonic() - begin, 1)
    unseen = [m.name for m in SCORED if not killer(m, tmp_path, BLIND)]
    alive = [mutant.name for mutant in SCORED if not killers[mutant.name]]
    score = 1 - len(alive) / len(SCORED)
    figures: dict[str, Any] = {"score": score, "num_mutants": len(SCORED), "alive": alive}
    figures["explained_survivors"] = {m.name: m.survives for m in MUTANTS if m.survives}
    figures["score_without_check_integrity"] = 1 - len(unseen) / len(SCORED)
    figures["killed_by"] = {name: found for name, found in killers.items() if found}
    evidence.record("mutants", figures | {"seconds_with_compilation": seconds})
    wrongly_explained = [m.name for m in MUTANTS if m.survives and killers[m.name]]
    assert not wrongly_explained, "a mutant said to be harmless was killed"
    assert score >= REQUIRED_SCORE, f"alive: {alive}"
