"""Times routing and the experts of small batches on the shapes of published models, routing drawn uniformly.

usage: python -m bench.ops.bench_moe [--out FILE] [--only NAME ...]

The floor counts the weights of the experts touched, once. Peers: torch's grouped product,
and vLLM's fused experts where vLLM is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.ops.command import run_alone
from bench.ops.peers import is_vllm_installed, vllm_configured
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
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


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


def vllm_experts(
    x: torch.Tensor,
    routing: Routing,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    activation: ActivationKind,
    is_gated: bool,
) -> torch.Tensor:
    """The same through vLLM's fused Triton kernels."""
    from vllm.model_executor.layers.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    kind = MoEActivation(activation if is_gated else f"{activation}_no_mul")
    with vllm_configured():
        out: torch.Tensor = fused_experts(
            x, w_in, w_out, routing.weights, routing.expert_ids, activation=kind
        )
    return out


def run(report: Report) -> None:
    for name, shape in SHAPES.items():
        if not report.wants_any(
            [f"{kind}/{name}/b{batch}" for kind in ("route", "experts") for batch in BATCHES]
        ):
            continue
        layer = Layer(shape)
        for batch in BATCHES:
            if report.wants(entry := f"route/{name}/b{batch}"):
                logits = torch.randn(batch, shape.num_experts, device=DEVICE)
                report.add(entry, time_us([partial(ops.route, logits, shape.top_k)]), 4.0 * logits.numel())
            if report.wants(entry := f"experts/{name}/b{batch}"):
                run_experts(report, entry, layer, batch)


def run_experts(report: Report, entry: str, layer: Layer, batch: int) -> None:
    shape = layer.shape
    x = torch.randn(batch, shape.hidden, device=DEVICE, dtype=DTYPE)
    routings = [layer.draw_routing(batch) for _ in range(NUM_ROUTINGS)]
    touched = sum(len({*r.expert_ids.flatten().tolist()}) for r in routings) / NUM_ROUTINGS

    def measure(experts: Callable[..., torch.Tensor]) -> float:
        return time_us([partial(layer.run, experts, x, routing) for routing in routings])

    peers = {"torch grouped": partial(measure, grouped_experts)}
    if is_vllm_installed():
        peers["vllm"] = partial(measure, vllm_experts)
    flops = batch * shape.top_k * shape.expert_bytes
    report.add(entry, measure(ops.moe_experts), touched * shape.expert_bytes, flops, peers)


if __name__ == "__main__":
    raise SystemExit(run_alone(__doc__, run))
