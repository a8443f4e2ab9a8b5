"""Times products of few tokens, as layers meet them: after an RMS norm, each on a matrix of its own.

usage: python -m bench.ops.bench_linear [--out FILE] [--only NAME ...]

The floor reads the matrix once. The peer is torch (cuBLAS). `linear` entries are products back to back, `norm_linear`
ones alternate with the norm that makes their input, so that what a product does while the norm runs counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.ops.command import run_alone
from bench.ops.report import Report
from bench.ops.timing import time_us
from headway import ops

DTYPE = torch.bfloat16
DEVICE = "cuda"
CACHE_BYTES = 200e6
BATCHES = (1, 2, 4, 8, 16)
# (inputs, outputs)
SHAPES = {
    "nano9b/in_proj": (4480, 22656),
    "nano9b/out_proj": (10240, 4480),
    "nano9b/mlp_in": (4480, 15680),
    "nano9b/mlp_out": (15680, 4480),
    "nano9b/qkv": (4480, 7168),
    "nano9b/head": (4480, 131072),
    "nano30b/in_proj": (2688, 10304),
    "nano30b/out_proj": (4096, 2688),
    "nano30b/shared_in": (2688, 3712),
    "nano30b/shared_out": (3712, 2688),
    "small/in_proj": (768, 3352),
    "small/out_proj": (1536, 768),
}


class NormedProduct:
    """A norm and the product of its result."""

    def __init__(self, x: torch.Tensor, gain: torch.Tensor, out: torch.Tensor) -> None:
        self.x, self.gain, self.out = x, gain, out
        self.normed = torch.empty_like(x)

    def __call__(self, product: Callable[..., object], weight: torch.Tensor) -> None:
        ops.rms_norm(self.x, self.gain, 1e-5, out=self.normed)
        product(self.normed, weight, out=self.out)


def run(report: Report) -> None:
    for name, (num_inputs, num_outputs) in SHAPES.items():
        if not report.wants_any(
            [f"{kind}/{name}/b{b}" for kind in ("linear", "norm_linear") for b in BATCHES]
        ):
            continue
        num_bytes = 2.0 * num_inputs * num_outputs
        copies = max(1, min(64, int(CACHE_BYTES / num_bytes)))
        weights = [
            torch.randn(num_outputs, num_inputs, device=DEVICE, dtype=DTYPE) * num_inputs**-0.5
            for _ in range(copies)
        ]
        gain = torch.ones(num_inputs, device=DEVICE, dtype=DTYPE)
        for batch in BATCHES:
            x = torch.randn(batch, num_inputs, device=DEVICE, dtype=DTYPE)
            out = torch.empty(batch, num_outputs, device=DEVICE, dtype=DTYPE)
            ours = [partial(ops.skinny_linear, x, w, out=out) for w in weights]
            torchs = [partial(torch.mm, x, w.t(), out=out) for w in weights]
            entry = f"linear/{name}/b{batch}"
            if report.wants(entry):
                report.add(entry, time_us(ours), num_bytes, peers={"cublas": partial(time_us, torchs)})

            entry = f"norm_{entry}"
            if report.wants(entry):
                normed = NormedProduct(x, gain, out)
                us = time_us([partial(normed, ops.skinny_linear, w) for w in weights])
                after_norms = [partial(normed, torch.mm, w.t()) for w in weights]
                report.add(entry, us, num_bytes, peers={"cublas": partial(time_us, after_norms)})


if __name__ == "__main__":
    raise SystemExit(run_alone(__doc__, run))
