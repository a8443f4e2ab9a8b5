"""Times every op of a layer at the shapes of published models, one at a time, on a CPU too.

usage: python -m bench.ops.bench_layer [--out FILE] [--only NAME ...]

On a GPU graphs of calls are replayed, on a CPU the time of a call from Python counts, since that is what a step pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.ops.command import run_alone
from bench.ops.report import Report
from bench.ops.timing import time_cpu_us, time_us
from bench.ops.workloads import Scene, builders
from tests.cases import MODEL_SHAPES, Rows, decode_rows

GPU_SHAPES = ("nano30b", "nano9b", "granite_tiny", "mamba2_2.7b")
CPU_SHAPES = ("small",)


def scenes(device: str) -> Iterator[Scene]:
    """Decode of one row and of a batch, and a prompt."""
    is_cuda = device == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    batch, prompt_len, kv_len = (64, 4096, 2048) if is_cuda else (8, 256, 256)
    yield Scene("b1", decode_rows(1, kv_len), dtype, device)
    yield Scene(f"b{batch}", decode_rows(batch, kv_len), dtype, device)
    yield Scene(f"1x{prompt_len}", Rows((prompt_len,), (0,)), dtype, device)


def run(report: Report) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measure: Callable[[Callable[[], object]], float] = (
        (lambda call: time_us([call])) if device == "cuda" else time_cpu_us
    )
    for name in GPU_SHAPES if device == "cuda" else CPU_SHAPES:
        for scene in scenes(device):
            for op, build in builders(MODEL_SHAPES[name]).items():
                entry = f"layer/{name}/{scene.title}/{op}"
                if report.wants(entry):
                    work = build(MODEL_SHAPES[name], scene)
                    report.add(entry, measure(work.run), work.num_bytes)


if __name__ == "__main__":
    raise SystemExit(run_alone(__doc__, run))
