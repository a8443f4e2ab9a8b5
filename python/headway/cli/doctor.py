"""`headway doctor`: what is installed, what runs here, what is missing and the command that mends it."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway import __version__

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "jinja2")
_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` is the command to run when something is missing."""

    name: str
    value: str
    is_ok: bool = True
    is_required: bool = True
    remedy: str = ""

    def __str__(self) -> str:
        mark = "ok" if self.is_ok else "MISSING" if self.is_required else "--"
        return f"{self.name:<14} {mark:<8} {self.value}" + (
            f"\n{'':<24}mend: {self.remedy}" if self.remedy else ""
        )


def add_to(commands: Any, *, shows_all: bool) -> None:
    parser = commands.add_parser(
        "doctor",
        help="report versions, modules and devices",
        description="Prints a report to paste into a bug report; exit code 1 when something required is missing.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    findings = list(examine())
    for finding in findings:
        print(finding)
    is_ready = all(finding.is_ok for finding in findings if finding.is_required)
    print("headway is ready" if is_ready else "headway cannot run here yet")
    return 0 if is_ready else 1


def examine() -> Iterator[Finding]:
    yield Finding("headway", f"{__version__} in {Path(__file__).parents[1]}")
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield from map(_package, _PACKAGES)
    yield _module("_core", is_required=True, device="cpu")
    yield _module("_cpu", is_required=True, device="cpu")
    yield _cpu()
    yield from _gpu()
    yield _embedded_model()


def _package(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", is_ok=False, remedy=f"pip install {name}")


def _module(name: str, *, is_required: bool, device: str) -> Finding:
    try:
        module = importlib.import_module(f"headway.{name}")
    except ImportError as error:
        remedy = f"HEADWAY_DEVICE={device} pip install --force-reinstall --no-deps ."
        return Finding(name, str(error), is_ok=False, is_required=is_required, remedy=remedy)
    return Finding(name, str(module.__file__), is_required=is_required)


def _cpu() -> Finding:
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.is_file() else set()
    features = [name for name in _CPU_FEATURES if name in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("cpu", f"{cores} cores, {', '.join(features) or 'no vector features known'}")


def _gpu() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        yield Finding(
            "gpu",
            f"torch {torch.__version__} sees none: the CPU will be used",
            is_ok=False,
            is_required=False,
        )
        return
    yield _module("_cuda", is_required=False, device="cuda")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        yield Finding(
            f"gpu {index}", f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
        )


def _embedded_model() -> Finding:
    folder = Path(__file__).parents[1] / "assets" / "tiny"
    is_there = (folder / "config.json").is_file()
    remedy = "" if is_there else "pip install --force-reinstall --no-deps ."
    return Finding("default model", str(folder), is_ok=is_there, remedy=remedy)
