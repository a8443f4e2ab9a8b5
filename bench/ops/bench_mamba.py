"""Times the Mamba-2 kernels on the shapes of published models: convolution, scan, gated norm, prefill and decode.

usage: python -m bench.ops.bench_mamba [--out FILE] [--peer FILE] [--shapes NAME ...] [--only PREFIX ...]

us is the median over replays of a graph of calls on rotating buffers. floor_us is the fewest bytes (each input read
once, each output written once) over the copy bandwidth measured in the same run. Where vLLM is installed, its kernels
run in the same process (peer_mamba.py); elsewhere a peer file may map the same names to {"gpu_us": ...}.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.ops import peer_mamba
from bench.ops.timing import copy_bytes_per_us, time_us
from headway import ops

DTYPE = torch.bfloat16
DEVICE = "cuda"
CACHE_BYTES = 200e6  # rotate among buffers of this much in all: several times the L2 cache


@dataclass(frozen=True)
class Shape:
    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    chunk_size: int  # the checkpoints' own, which the peer's kernels use

    @property
    def d_inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.num_groups * self.state_size

    @property
    def state_elements(self) -> int:
        return self.num_heads * self.head_dim * self.state_size


SHAPES = {
    "nano30b": Shape(64, 64, 8, 128, 128),
    "nano9b": Shape(128, 80, 8, 128, 128),
    "granite_tiny": Shape(48, 64, 1, 128, 256),
    "mamba2_2.7b": Shape(80, 64, 1, 128, 256),
}
BATCHES = (1, 8, 64, 256)


def ragged(num_rows: int, total: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    weights = [draw.random() + 0.05 for _ in range(num_rows)]
    lengths = [max(1, int(total * weight / sum(weights))) for weight in weights]
    lengths[-1] += total - sum(lengths)
    return lengths


PREFILL = {"1x512": [512], "1x4096": [4096], "8x2048": [2048] * 8, "ragged32_16k": ragged(32, 16384)}


class Mixer:
    """One layer's buffers for one step: the in_proj output, what follows from it, and the rows' slots."""

    def __init__(self, shape: Shape, lengths: list[int], start: int) -> None:
        self.shape = shape
        num_tokens, num_rows = sum(lengths), len(lengths)
        width = shape.d_inner + shape.conv_dim + shape.num_heads
        states = shape.num_groups * shape.state_size
        projected = torch.randn(num_tokens, width, device=DEVICE, dtype=DTYPE)
        self.z, self.raw, self.dt = torch.split(
            projected, [shape.d_inner, shape.conv_dim, shape.num_heads], dim=1
        )
        self.columns = torch.randn(num_tokens, shape.conv_dim, device=DEVICE, dtype=DTYPE)
        x, B, C = torch.split(self.columns, [shape.d_inner, states, states], dim=1)
        self.x = x.unflatten(1, (shape.num_heads, shape.head_dim))
        self.B, self.C = (v.mul_(0.1).unflatten(1, (shape.num_groups, shape.state_size)) for v in (B, C))
        self.y = torch.empty(num_tokens, shape.num_heads, shape.head_dim, device=DEVICE, dtype=DTYPE)
        self.gated = torch.empty(num_tokens, shape.d_inner, device=DEVICE, dtype=DTYPE)
        self.conv_state = torch.randn(num_rows + 1, 3, shape.conv_dim, device=DEVICE, dtype=DTYPE)
        state_shape = (num_rows + 1, shape.num_heads, shape.head_dim, shape.state_size)
        self.ssm_state = torch.randn(state_shape, device=DEVICE) * 0.1
        slots = torch.randperm(num_rows, device=DEVICE).int() + 1
        query_start = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
        self.rows = (query_start, torch.full_like(slots, start), slots, slots)
        self.max_query_len = max(lengths)
        heads = torch.rand(3, shape.num_heads, device=DEVICE)
        self.A, self.D, self.dt_bias = -heads[0] * 8 - 0.5, heads[1], heads[2] - 4
        self.conv_weight = torch.randn(4, shape.conv_dim, device=DEVICE, dtype=DTYPE)
        self.conv_bias = torch.randn(shape.conv_dim, device=DEVICE, dtype=DTYPE)
        self.norm_weight = torch.randn(shape.d_inner, device=DEVICE, dtype=DTYPE)

    @property
    def num_bytes(self) -> int:
        tensors = (self.z, self.raw, self.columns, self.y, self.gated, self.conv_state, self.ssm_state)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def conv(self) -> None:
        ops.causal_conv1d(
            self.raw, self.conv_weight, self.conv_bias, self.conv_state, *self.rows, out=self.columns
        )

    def scan(self) -> None:
        ops.ssm_scan(
            self.x, self.B, self.C, self.dt, self.A, self.D, self.dt_bias, self.ssm_state, *self.rows,
            max_query_len=self.max_query_len, out=self.y,
        )  # fmt: skip

    def norm(self) -> None:
        y, group_size = self.y.flatten(1), self.shape.d_inner // self.shape.num_groups
        ops.gated_rms_norm(y, self.z, self.norm_weight, 1e-5, group_size, out=self.gated)

    def chain(self) -> None:
        self.conv()
        self.scan()
        self.norm()

    def decode(self) -> None:
        _, row_start, read_slots, write_slots = self.rows
        ops.mamba_decode(
            self.z, self.raw, self.dt, self.conv_weight, self.conv_bias, self.conv_state, self.A, self.D, self.dt_bias,
            self.ssm_state, self.norm_weight, 1e-5, row_start, read_slots, write_slots, out=self.gated,
        )  # fmt: skip


@dataclass(frozen=True)
class Entry:
    name: str  # as in a peer file
    call: Callable[[Mixer], None]
    num_bytes: float


def prefill_entries(shape: Shape, name: str, load: str, lengths: list[int]) -> Iterator[Entry]:
    tokens, states = sum(lengths), len(lengths) * shape.state_elements
    d, groups = shape.d_inner, shape.num_groups * shape.state_size
    conv, norm = 4.0 * tokens * shape.conv_dim, 6.0 * tokens * d
    scan = tokens * (4.0 * d + 2 * shape.num_heads + 4 * groups) + 8.0 * states
    yield Entry(f"ssd/{name}/{load}", Mixer.scan, scan)
    yield Entry(f"conv/{name}/{load}", Mixer.conv, conv)
    yield Entry(f"gated_norm_prefill/{name}/{load}", Mixer.norm, norm)
    yield Entry(f"chain/{name}/{load}", Mixer.chain, conv + scan + norm)


def decode_entries(shape: Shape, name: str, batch: int) -> Iterator[Entry]:
    state, conv, norm = (
        8.0 * batch * shape.state_elements,
        16.0 * batch * shape.conv_dim,
        6.0 * batch * shape.d_inner,
    )
    yield Entry(f"ssm_step/{name}/b{batch}/fp32", Mixer.scan, state)
    yield Entry(f"conv_step/{name}/b{batch}", Mixer.conv, conv)
    yield Entry(f"gated_norm/{name}/b{batch}", Mixer.norm, norm)
    yield Entry(f"decode_chain/{name}/b{batch}", Mixer.chain, state + conv + norm)
    # One launch: the convolution's output and y never leave the chip.
    fused = state + 16.0 * batch * shape.conv_dim - 2.0 * batch * shape.conv_dim + 4.0 * batch * shape.d_inner
    yield Entry(f"decode_fused/{name}/b{batch}", Mixer.decode, fused)


def run_load(shape: Shape, lengths: list[int], start: int, entries: list[Entry], report: Report) -> None:
    first = Mixer(shape, lengths, start)
    copies = max(1, min(64, int(CACHE_BYTES / first.num_bytes)))
    mixers = [first, *(Mixer(shape, lengths, start) for _ in range(copies - 1))]
    peer_calls = peer_mamba.PeerMixer(first).calls() if report.runs_peer else {}
    for entry in entries:
        if call := peer_calls.get(entry.name.split("/")[0]):
            report.peer[entry.name] = {"gpu_us": peer_mamba.kernel_us(call)}
        report.add(entry, time_us([partial(entry.call, mixer) for mixer in mixers]))


class Report:
    """Prints a line an entry and keeps the numbers."""

    def __init__(self, bytes_per_us: float, peer: dict[str, dict[str, float]]) -> None:
        self.bytes_per_us = bytes_per_us
        self.peer = peer
        self.runs_peer = not peer and peer_mamba.is_installed()
        self.results: dict[str, dict[str, float]] = {}
        print(
            f"{'kernel':40s} {'us':>9s} {'GB/s':>7s} {'floor us':>9s} {'x floor':>8s} {'peer us':>9s} {'faster':>7s}"
        )

    def add(self, entry: Entry, us: float) -> None:
        floor = entry.num_bytes / self.bytes_per_us
        peer_us = self._peer_us(entry.name)
        result = {
            "us": us,
            "gb_per_s": entry.num_bytes / us / 1e3,
            "floor_us": floor,
            "over_floor": us / floor,
        }
        if peer_us is not None:
            result |= {"peer_us": peer_us, "times_faster": peer_us / us}
        self.results[entry.name] = {key: round(value, 3) for key, value in result.items()}
        tail = "" if peer_us is None else f" {peer_us:9.1f} {peer_us / us:7.2f}"
        numbers = f"{us:9.2f} {result['gb_per_s']:7.0f} {floor:9.2f} {us / floor:8.2f}"
        print(f"{entry.name:40s} {numbers}{tail}", flush=True)

    def _peer_us(self, name: str) -> float | None:
        kind, _, rest = name.partition("/")
        parts = [name]
        if kind == "chain" and name not in self.peer:
            parts = [f"{part}/{rest}" for part in ("conv", "ssd", "gated_norm_prefill")]
        if kind in ("decode_chain", "decode_fused") and name not in self.peer:
            parts = [f"conv_step/{rest}", f"ssm_step/{rest}/fp32", f"gated_norm/{rest}"]
        if any(part not in self.peer for part in parts):
            return None
        return sum(self.peer[part]["gpu_us"] for part in parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--peer", type=Path, help="a peer's times by the same names, to print ratios")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="prefixes of the names to run, such as ssd or conv"
    )
    args = parser.parse_args(argv)
    peer = json.loads(args.peer.read_text()) if args.peer else {}
    report = Report(copy_bytes_per_us(), peer)

    def wanted(entries: Iterator[Entry]) -> list[Entry]:
        return [entry for entry in entries if entry.name.startswith(tuple(args.only))]

    with peer_mamba.configured() if report.runs_peer else nullcontext():
        for name in args.shapes:
            shape = SHAPES[name]
            for load, lengths in PREFILL.items():
                if entries := wanted(prefill_entries(shape, name, load, lengths)):
                    run_load(shape, lengths, 64, entries, report)
            for batch in BATCHES:
                if entries := wanted(decode_entries(shape, name, batch)):
                    run_load(shape, [1] * batch, 1000, entries, report)
    if args.out:
        header = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_gb_per_s": round(report.bytes_per_us / 1e3),
        }
        args.out.write_text(json.dumps(header | report.results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
