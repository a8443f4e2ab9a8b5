"""Times the Mamba-2 kernels on the shapes of published models: convolution, scan, gated norm, prefill and decode.

usage: python -m bench.ops.bench_mamba [--out FILE] [--only NAME ...]

us is the median over replays of a graph of calls on rotating buffers. floor_us is the fewest bytes (each input read
once, each output written once) over the copy bandwidth measured in the same run; beside kernels that do little but
move bytes stands an elementwise kernel of torch that moves as many. Where vLLM is installed, its kernels run in the
same process; else times of theirs that were recorded stand beside ours (peer_mamba.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch

from bench.ops.command import run_alone
from bench.ops.peer_mamba import peers_of
from bench.ops.report import Report
from bench.ops.timing import time_us
from headway import ops

DTYPE = torch.bfloat16
DEVICE = "cuda"
FIRST_POSITION = 1008  # of the decode rows
WINDOW = 16
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

    def __init__(
        self, shape: Shape, lengths: list[int], start: int, ssm_dtype: torch.dtype = torch.float32
    ) -> None:
        self.shape = shape
        num_tokens, num_rows = sum(lengths), len(lengths)
        width = shape.d_inner + shape.conv_dim + shape.num_heads
        states = shape.num_groups * shape.state_size
        projected = torch.randn(num_tokens, width, device=DEVICE, dtype=DTYPE)
        self.projected = projected.flatten()
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
        self.ssm_state = (torch.randn(state_shape, device=DEVICE) * 0.1).to(ssm_dtype)
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

    def copy_as_conv(self) -> None:
        """Reads and writes as many bytes as `conv`, of contiguous tensors: torch's strided kernel is a slower one."""
        torch.neg(self._projected_as(self.columns), out=self.columns)

    def copy_as_norm(self) -> None:
        torch.add(self.y.flatten(1), self._projected_as(self.gated), out=self.gated)

    def _projected_as(self, like: torch.Tensor) -> torch.Tensor:
        return self.projected[: like.numel()].view_as(like)


class WindowedMixer(Mixer):
    """The same over slot windows. Rows move over all phases of a window: together or, as requests of their own
    lengths do, a sixteenth of them at each."""

    def __init__(
        self,
        shape: Shape,
        batch: int,
        query_len: int,
        max_rewind: int,
        ssm_dtype: torch.dtype = torch.float32,
        is_spread: bool = False,
    ) -> None:
        super().__init__(shape, [query_len] * batch, FIRST_POSITION, ssm_dtype)
        self.query_len = query_len
        self.row_phases = torch.arange(batch, device=DEVICE, dtype=torch.int32) % WINDOW * is_spread
        self.weights = ops.MixerWeights(
            conv_weight=self.conv_weight,
            conv_bias=self.conv_bias,
            A=self.A,
            D=self.D,
            dt_bias=self.dt_bias,
            norm_weight=self.norm_weight,
            norm_eps=1e-5,
            norm_group_size=shape.d_inner // shape.num_groups,
        )
        self.log = ops.StateLog.allocate(
            batch + 1,
            d_inner=shape.d_inner,
            group_states=shape.num_groups * shape.state_size,
            num_heads=shape.num_heads,
            width=4,
            window=ops.StateWindow(WINDOW, max_rewind),
            max_query_len=query_len,
            dtype=DTYPE,
            device=DEVICE,
        )
        for ring in (self.log.columns, self.log.dt, self.log.raw):
            ring.normal_(std=0.1)
        self.phases = [self._phase(p) for p in range(FIRST_POSITION, FIRST_POSITION + WINDOW, query_len)]

    def _phase(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """row_start and state_base of rows that come along from far back."""
        row_start = self.row_phases + position
        return row_start, (row_start - self.log.window.max_rewind) // WINDOW * WINDOW

    def decode(self, phase: int) -> None:
        query_start, _, slots, _ = self.rows
        row_start, state_base = self.phases[phase % len(self.phases)]
        ops.mamba_decode(
            self.z, self.raw, self.dt, self.weights, self.conv_state, self.ssm_state, self.log,
            query_start, row_start, slots, state_base, max_query_len=self.query_len, out=self.gated,
        )  # fmt: skip


@dataclass(frozen=True)
class Entry:
    name: str
    call: Callable[[Mixer], None]
    num_bytes: float
    copies: Mapping[str, Callable[[Mixer], None]] = field(default_factory=dict)


# What no kernel of so few bytes is much faster than: the floor comes of a copy of a gigabyte.
CONV_COPY = {"torch.neg, as many bytes": Mixer.copy_as_conv}
NORM_COPY = {"torch.add, as many bytes": Mixer.copy_as_norm}


def prefill_entries(shape: Shape, name: str, load: str, lengths: list[int]) -> Iterator[Entry]:
    tokens, states = sum(lengths), len(lengths) * shape.state_elements
    d, groups = shape.d_inner, shape.num_groups * shape.state_size
    conv, norm = 4.0 * tokens * shape.conv_dim, 6.0 * tokens * d
    scan = tokens * (4.0 * d + 2 * shape.num_heads + 4 * groups) + 8.0 * states
    yield Entry(f"ssd/{name}/{load}", Mixer.scan, scan)
    yield Entry(f"conv/{name}/{load}", Mixer.conv, conv, CONV_COPY)
    yield Entry(f"gated_norm_prefill/{name}/{load}", Mixer.norm, norm, NORM_COPY)
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


STATE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def run_windows(report: Report, shape: Shape, name: str, batch: int) -> None:
    """Averages over a whole window; the floor is that of states in place, read and written at every step."""
    for (query_len, max_rewind), (state, ssm_dtype), is_spread in product(
        ((1, 1), (4, 3)), STATE_DTYPES.items(), (False, True)
    ):
        kind = "decode_window" if query_len == 1 else f"decode_window_{query_len}_tokens"
        entry = f"{kind}/{name}/b{batch}/{state}{'/spread' if is_spread else ''}"
        if (is_spread and (batch < WINDOW or ssm_dtype != torch.float32)) or not report.wants(entry):
            continue
        make = partial(WindowedMixer, shape, batch, query_len, max_rewind, ssm_dtype, is_spread)
        first = make()
        copies = max(1, min(WINDOW, int(CACHE_BYTES / first.num_bytes)))
        mixers = [first, *(make() for _ in range(copies - 1))]
        num_phases = len(first.phases)
        calls = [
            partial(mixers[i % copies].decode, i // copies if copies % num_phases == 0 else i)
            for i in range(copies * num_phases)
        ]
        peers = peers_of(mixers, entry) if query_len == 1 and ssm_dtype == torch.float32 else {}
        report.add(
            entry, time_us(calls), 2.0 * ssm_dtype.itemsize * batch * shape.state_elements, peers=peers
        )


def run_load(report: Report, shape: Shape, lengths: list[int], start: int, entries: list[Entry]) -> None:
    entries = [entry for entry in entries if report.wants(entry.name)]
    if not entries:
        return
    first = Mixer(shape, lengths, start)
    copies = max(1, min(64, int(CACHE_BYTES / first.num_bytes)))
    mixers = [first, *(Mixer(shape, lengths, start) for _ in range(copies - 1))]
    for entry in entries:
        us = time_us([partial(entry.call, mixer) for mixer in mixers])
        copy_times = {
            copy: partial(time_us, [partial(call, mixer) for mixer in mixers])
            for copy, call in entry.copies.items()
        }
        report.add(entry.name, us, entry.num_bytes, peers=copy_times | peers_of(mixers, entry.name))


def run(report: Report) -> None:
    for name, shape in SHAPES.items():
        for load, lengths in PREFILL.items():
            run_load(report, shape, lengths, 64, list(prefill_entries(shape, name, load, lengths)))
        for batch in BATCHES:
            run_load(report, shape, [1] * batch, FIRST_POSITION, list(decode_entries(shape, name, batch)))
            run_windows(report, shape, name, batch)


if __name__ == "__main__":
    raise SystemExit(run_alone(__doc__, run))
