"""Compiles the core's native test programs with the C++ compiler alone.

Objects are kept under `build/evidence` by a hash of everything that goes into them, so that a second run compiles
nothing, and a changed source costs what depends on it. That is what makes mutants cheap: see `test_mutants.py`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "evidence"
LIBRARY = ["core/*.cpp", "cpu/begin_step.cpp", "cpu/finish_step.cpp"]
SIMULATION = [
    f"tests/sim/{name}.cpp" for name in ("client", "device", "host", "policy", "transfers", "workload")
]
FUZZ = [*LIBRARY, *SIMULATION, "tests/fuzz/*.cpp"]
TREE = ["core/*.cpp", "tests/check.cpp", "tests/tree/*.cpp"]
SIM = [*LIBRARY, "tests/sim/*.cpp"]
CHECKS = [
    "core/*.cpp",
    *(f"tests/{name}.cpp" for name in ("check", "main", "counting_new")),
    "tests/core/*.cpp",
]

WARNINGS = ["-std=c++20", "-pthread", "-Wall", "-Wextra", "-Wshadow", "-D_GLIBCXX_ASSERTIONS"]
NO_PATHS = "-fmacro-prefix-map={}/="  # so that messages name files as below csrc/
FAST = ("-O2",)
QUICK = ("-O1",)  # compiles in half the time
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD_SANITIZED = ("-O1", "-g", "-fsanitize=thread")


class CompileError(Exception):
    """The compiler's own words."""


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert found, "the native tests need a C++ compiler"
    return found


@dataclass(frozen=True)
class Program:
    """Sources (globs below csrc/) and flags. `overlay` replaces files: path below csrc/ -> text."""

    sources: list[str]
    flags: tuple[str, ...] = FAST

    def build(self, target: Path, overlay: dict[str, str] | None = None, cache: Path = CACHE) -> Path:
        """Links the program to `target`; raises CompileError."""
        tree = Tree(overlay or {})
        paths = sorted({p for glob in self.sources for p in CSRC.glob(glob)})
        with locked(cache):
            objects = [tree.compile(p.relative_to(CSRC).as_posix(), self.flags, cache) for p in paths]
            run_compiler([*self.flags, *map(str, objects), "-pthread", "-o", str(target)])
        return target


class Tree:
    """csrc/ with some files replaced."""

    def __init__(self, overlay: dict[str, str]) -> None:
        self._overlay = overlay
        self._texts: dict[str, str | None] = {}

    def text(self, name: str) -> str | None:
        if name not in self._texts:
            path = CSRC / name
            disk = path.read_text() if path.is_file() else None
            self._texts[name] = self._overlay.get(name, disk)
        return self._texts[name]

    def closure(self, name: str) -> list[str]:
        """The file and all it includes, by name."""
        seen: set[str] = set()
        todo = [name]
        while todo:
            current = todo.pop()
            text = self.text(current)
            if current in seen or text is None:
                continue
            seen.add(current)
            todo.extend(re.findall(r'^#include "([^"]+)"', text, re.MULTILINE))
        return sorted(seen)

    def compile(self, name: str, flags: tuple[str, ...], cache: Path) -> Path:
        files = self.closure(name)
        key = hashlib.sha256(repr((compiler(), WARNINGS, NO_PATHS, flags, name)).encode())
        for file in files:
            key.update(f"{file}\0{self.text(file)}\0".encode())
        stem = f"{Path(name).stem}-{key.hexdigest()[:24]}"
        # A mutant's objects are of no use to anybody else.
        is_mutant = any(file in self._overlay for file in files)
        folder = cache / ("mutants" if is_mutant else "objects")
        folder.mkdir(parents=True, exist_ok=True)
        built = folder / f"{stem}.o"
        if not built.exists():
            self._compile_into(built, name, files, flags)
        return built

    def _compile_into(self, built: Path, name: str, files: list[str], flags: tuple[str, ...]) -> None:
        """From a copy of exactly the files of the hash, since somebody may be editing them."""
        copy = built.with_suffix(".src")
        for file in files:
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            (copy / file).write_text(self.text(file) or "")
        partial = built.with_suffix(".part")
        run_compiler(
            [
                *WARNINGS,
                *flags,
                NO_PATHS.format(copy),
                f"-I{copy}",
                "-c",
                str(copy / name),
                "-o",
                str(partial),
            ]
        )
        partial.rename(built)
        shutil.rmtree(copy)


def run_compiler(arguments: list[str]) -> None:
    done = subprocess.run([compiler(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(done.stderr[-2000:])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One builder at a time, whatever runs in parallel."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(program: Path, *arguments: str | int, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Runs to the end; the caller judges the exit code."""
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
