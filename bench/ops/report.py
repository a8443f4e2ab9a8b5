"""A table of kernel times on the terminal, and the same numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.ops.peers import time_or_reason

HEAD = f"{'kernel':44s} {'us':>9s} {'GB/s':>7s} {'TFLOP/s':>8s} {'x floor':>8s}   peers: us (how many times slower)"


@dataclass
class Report:
    """Times beside the fewest bytes over the copy bandwidth measured in the same run, and beside peers' times.

    wanted: names to run, or their beginnings up to a slash. out: written after each entry: a run that is stopped keeps
    what it has. commit: of the tree under test.
    """

    bytes_per_us: float
    wanted: tuple[str, ...] = ()
    out: Path | None = None
    commit: str = "unknown"
    results: dict[str, dict[str, object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        print(f"{device_name()}, torch {torch.__version__}, copy {self.bytes_per_us / 1e3:.0f} GB/s")
        print(HEAD)

    def wants(self, name: str) -> bool:
        return not self.wanted or any(f"{name}/".startswith(f"{part.rstrip('/')}/") for part in self.wanted)

    def wants_any(self, names: list[str]) -> bool:
        return any(self.wants(name) for name in names)

    def add(
        self,
        name: str,
        us: float,
        num_bytes: float,
        flops: float = 0.0,
        peers: Mapping[str, Callable[[], float]] | None = None,
    ) -> None:
        """peers: by name, what measures the time of another implementation of the same work, in us."""
        floor_us = num_bytes / self.bytes_per_us
        rates = {"gb_per_s": num_bytes / us / 1e3, "tflop_per_s": flops / us / 1e6}
        result = {"us": us, **rates, "floor_us": floor_us, "over_floor": us / floor_us}
        times = {peer: time_or_reason(measure) for peer, measure in (peers or {}).items()}
        self.results[name] = {key: round(value, 3) for key, value in result.items()}
        if times:
            self.results[name]["peers"] = {peer: _peer_entry(time, us) for peer, time in times.items()}
        numbers = f"{us:9.2f} {rates['gb_per_s']:7.0f} {rates['tflop_per_s']:8.1f} {us / floor_us:8.2f}"
        cells = "; ".join(f"{peer} {_peer_cell(time, us)}" for peer, time in times.items())
        print(f"{name:44s} {numbers}   {cells}".rstrip(), flush=True)
        self.write()

    def write(self) -> None:
        if self.out is None:
            return
        header = {
            "commit": self.commit,
            "device": device_name(),
            "torch": torch.__version__,
            "copy_gb_per_s": round(self.bytes_per_us / 1e3),
        }
        self.out.write_text(json.dumps(header | self.results, indent=1) + "\n")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def _peer_entry(time: float | str, us: float) -> dict[str, float | str]:
    if isinstance(time, str):
        return {"reason": time}
    return {"us": round(time, 3), "times_slower": round(time / us, 3)}


def _peer_cell(time: float | str, us: float) -> str:
    return time if isinstance(time, str) else f"{time:.2f} ({time / us:.2f})"
