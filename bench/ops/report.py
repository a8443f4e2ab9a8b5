"""A table of kernel times on the terminal, and the same numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.ops.timing import copy_bytes_per_us


@dataclass
class Report:
    """Times beside the fewest bytes over the copy bandwidth measured in the same run."""

    bytes_per_us: float = field(default_factory=copy_bytes_per_us)
    results: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        print(
            f"{'kernel':44s} {'us':>9s} {'GB/s':>7s} {'TFLOP/s':>8s} {'floor us':>9s} {'x floor':>8s} {'other us':>9s}"
        )

    def add(
        self,
        name: str,
        us: float,
        num_bytes: float,
        flops: float = 0.0,
        other_us: float | None = None,
        peers_us: Mapping[str, float] | None = None,
    ) -> None:
        """other_us: the same work by another implementation, named by the benchmark; peers_us: by several."""
        floor = num_bytes / self.bytes_per_us
        result = {
            "us": us,
            "gb_per_s": num_bytes / us / 1e3,
            "tflop_per_s": flops / us / 1e6,
            "floor_us": floor,
            "over_floor": us / floor,
        }
        if other_us is not None:
            result |= {"other_us": other_us, "times_faster": other_us / us}
        for peer, peer_us in (peers_us or {}).items():
            result |= {f"{peer}_us": peer_us, f"times_faster_than_{peer}": peer_us / us}
        self.results[name] = {key: round(value, 3) for key, value in result.items()}
        numbers = (
            f"{us:9.2f} {result['gb_per_s']:7.0f} {result['tflop_per_s']:8.1f} {floor:9.2f} {us / floor:8.2f}"
        )
        others = "" if other_us is None else f" {other_us:9.2f}"
        others += "".join(f" {peer} {peer_us:.2f}" for peer, peer_us in (peers_us or {}).items())
        print(f"{name:44s} {numbers}{others}", flush=True)

    def write(self, path: Path | None) -> None:
        if path is None:
            return
        header = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_gb_per_s": round(self.bytes_per_us / 1e3),
        }
        path.write_text(json.dumps(header | self.results, indent=1) + "\n")
