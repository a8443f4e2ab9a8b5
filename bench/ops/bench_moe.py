"""Times routing and the experts of small batches on the shapes of published models, routing drawn uniformly.

usage: python -m bench.ops.bench_moe [--out FILE] [--only PREFIX ...]

The floor counts the weights of the experts touched, once. The other implementation is torch's grouped product.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.ops.report import Report
from bench.ops.timing import time_us
from headway import ops
from headway.ops.moe import grouped_experts
from headway.ops.records import ActivationKind, Routing

DTYPE = torch.bfloat16
DEVICE = "cuda"
NUM_ROUTINGS = 4  # in turn, so that the cache does not hold the experts of the call before


@dataclass(frozen=True)
class Shape:
    hidden: int
    width: int
    num_experts: int
    top_k: int
    activation: ActivationKind
    is_gated: bool

    @property
    def expert_bytes(self) -> float:
        return 2.0 * self.hidden * self.width * (3 if self.is_gated else 2)


SHAPES = {
    "nano30b": Shape(2688, 1856, 128, 6, "relu2", False),
    "granite_tiny": Shape(1536, 512, 64, 6, "silu", True),
    "qwen3_30b": Shape(2048, 768, 128, 8, "silu", True),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Layer:
    def __init__(self, shape: Shape) -> None:
        columns = 2 * shape.width if shape.is_gated else shape.width
        self.shape = shape
        self.w_in = torch.randn(shape.num_experts, columns, shape.hidden, device=DEVICE, dtype=DTYPE) * 0.02
        self.w_out = (
            torch.randn(shape.num_experts, shape.hidden, shape.width, device=DEVICE, dtype=DTYPE) * 0.02
        )

    def draw_routing(self, batch: int) -> Routing:
        logits = torch.randn(batch, self.shape.num_experts, device=DEVICE)
        return ops.route(logits, self.shape.top_k, score="sigmoid", scale=2.5)

    def run(self, experts: Callable[..., torch.Tensor], x: torch.Tensor, routing: Routing) -> None:
        experts(x, routing, self.w_in, self.w_out, self.shape.activation, self.shape.is_gated)


def run(report: Report, wanted: Callable[[str], bool]) -> None:
    for name, shape in SHAPES.items():
        layer = Layer(shape)
        for batch in BATCHES:
            x = torch.randn(batch, shape.hidden, device=DEVICE, dtype=DTYPE)
            if wanted(entry := f"route/{name}/b{batch}"):
                logits = torch.randn(batch, shape.num_experts, device=DEVICE)
                report.add(entry, time_us([partial(ops.route, logits, shape.top_k)]), 4.0 * logits.numel())
            if wanted(entry := f"experts/{name}/b{batch}"):
                routings = [layer.draw_routing(batch) for _ in range(NUM_ROUTINGS)]
                touched = sum(len({*r.expert_ids.flatten().tolist()}) for r in routings) / NUM_ROUTINGS
                us, other_us = (
                    time_us([partial(layer.run, experts, x, routing) for routing in routings])
                    for experts in (ops.moe_experts, grouped_experts)
                )
                flops = batch * shape.top_k * shape.expert_bytes
                report.add(entry, us, touched * shape.expert_bytes, flops, other_us)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--only", nargs="+", default=[""], help="prefixes of names, such as experts/nano30b")
    args = parser.parse_args(argv)
    report = Report()
    run(report, lambda name: name.startswith(tuple(args.only)))
    report.write(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
