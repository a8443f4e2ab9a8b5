"""Times every op of a layer on the device present and prints one table.

usage: python -m bench.ops [--device cpu|cuda] [--shapes NAME ...] [--ops NAME ...] [--dtype fp32|bf16] [--out FILE]

The floor is each op's fewest bytes over the copy bandwidth measured in the same run. On a GPU, graphs of calls are
replayed; on a CPU the time of a call from Python counts, since that is what a step pays.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.ops.timing import copy_bytes_per_us, time_us
from bench.ops.workloads import Scene, works
from tests.cases import MODEL_SHAPES, Rows, decode_rows

GPU_SHAPES = ("nano30b", "nano9b", "granite_tiny", "mamba2_2.7b")
CPU_SHAPES = ("small",)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIN_CPU_SECONDS = 0.1


def time_cpu_us(run: Callable[[], object]) -> float:
    """Best time of one call: other processes only ever add to it."""
    for _ in range(3):
        run()
    best, end = float("inf"), time.perf_counter() + MIN_CPU_SECONDS
    while time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best * 1e6


def cpu_bytes_per_us(num_bytes: int = 2**26) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * num_bytes / time_cpu_us(lambda: target.copy_(source))


def scenes(device: str, dtype: torch.dtype) -> Iterator[Scene]:
    """Decode of one row and of a batch, and a prompt."""
    batch, prompt_len, kv_len = (64, 4096, 2048) if device == "cuda" else (8, 256, 256)
    yield Scene("decode 1", decode_rows(1, kv_len), dtype, device)
    yield Scene(f"decode {batch}", decode_rows(batch, kv_len), dtype, device)
    yield Scene(f"prompt {prompt_len}", Rows((prompt_len,), (0,)), dtype, device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description="times every op of a layer")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--shapes", nargs="+", choices=tuple(MODEL_SHAPES), metavar="NAME")
    parser.add_argument("--ops", nargs="+", metavar="NAME")
    parser.add_argument("--dtype", choices=tuple(DTYPES))
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the same numbers as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    is_cuda = arguments.device == "cuda"
    dtype = DTYPES[arguments.dtype or ("bf16" if is_cuda else "fp32")]
    bytes_per_us = copy_bytes_per_us() if is_cuda else cpu_bytes_per_us()
    print(
        f"{arguments.device}, {dtype}, copy {bytes_per_us / 1e3:.0f} GB/s, {torch.get_num_threads()} CPU threads"
    )
    print(f"{'shape':14s} {'step':12s} {'op':16s} {'us':>10s} {'GB/s':>8s} {'x floor':>8s}")
    results = []
    for name in arguments.shapes or (GPU_SHAPES if is_cuda else CPU_SHAPES):
        for scene in scenes(arguments.device, dtype):
            for work in works(MODEL_SHAPES[name], scene):
                if arguments.ops and work.name not in arguments.ops:
                    continue
                us = time_us([work.run]) if is_cuda else time_cpu_us(work.run)
                rate, over = work.num_bytes / us / 1e3, us * bytes_per_us / work.num_bytes
                row = {"shape": name, "step": scene.title, "op": work.name}
                print(
                    f"{name:14s} {scene.title:12s} {work.name:16s} {us:10.1f} {rate:8.1f} {over:8.1f}",
                    flush=True,
                )
                results.append(row | {"us": us, "gb_per_s": rate, "over_floor": over})
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
