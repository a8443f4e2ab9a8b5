"""Times paged attention, decode and prefill, on the shapes of published models.

usage: python -m bench.ops.bench_attention [--out FILE] [--only NAME ...]

Peers: torch's flash attention on contiguous keys and values, for prompts without cached ones; FlashAttention 3 over the
same pages, as vLLM packs it, where vLLM is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ops.command import run_alone
from bench.ops.peers import is_vllm_installed
from bench.ops.report import Report
from bench.ops.timing import time_us
from headway import ops

DTYPE = torch.bfloat16
DEVICE = "cuda"
CACHE_BYTES = 200e6
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def kv_bytes(self, num_tokens: int) -> float:
        return 4.0 * num_tokens * self.num_kv_heads * self.head_dim


SHAPES = {
    "nano30b": Shape(32, 2, 128),
    "nano9b": Shape(40, 8, 128),
    "gqa4": Shape(32, 8, 128),
    "hd64": Shape(32, 8, 64),
    "mha": Shape(16, 16, 128),
}
DECODE = [(1, 1024), (1, 8192), (8, 1024), (8, 8192), (64, 1024), (64, 8192), (256, 1024)]
PREFILL = {"1x8192": (1, 8192, 0), "8x2048": (8, 2048, 0), "1x2048_after_6144": (1, 2048, 6144)}


class Step:
    """Rows of num_queries tokens each, after `start` cached ones, over shuffled blocks."""

    def __init__(self, shape: Shape, num_rows: int, num_queries: int, start: int) -> None:
        self.kv_len = start + num_queries
        self.num_queries, self.scale = num_queries, shape.head_dim**-0.5
        blocks_per_row = -(-self.kv_len // BLOCK_SIZE)
        num_blocks = num_rows * blocks_per_row + 1
        cache_shape = (num_blocks, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        self.k_cache, self.v_cache = (torch.randn(cache_shape, device=DEVICE, dtype=DTYPE) for _ in range(2))
        table = torch.zeros(num_rows + 1, blocks_per_row, device=DEVICE, dtype=torch.int32)
        table[1:] = torch.randperm(num_blocks - 1, device=DEVICE).int().view(num_rows, blocks_per_row) + 1
        self.block_table = table
        self.rows = torch.arange(1, num_rows + 1, device=DEVICE, dtype=torch.int32)
        self.query_start = torch.arange(num_rows + 1, device=DEVICE, dtype=torch.int32) * num_queries
        self.row_start = torch.full((num_rows,), start, device=DEVICE, dtype=torch.int32)
        self.kv_lens = self.row_start + num_queries
        q_shape = (num_rows * num_queries, shape.num_heads, shape.head_dim)
        self.q = torch.randn(q_shape, device=DEVICE, dtype=DTYPE)
        self.out = torch.empty_like(self.q)

    def attend(self) -> None:
        ops.paged_attention(
            self.q, self.k_cache, self.v_cache, self.block_table, self.rows, self.query_start, self.row_start,
            self.num_queries, self.kv_len, self.scale, out=self.out,
        )  # fmt: skip


def steps_of(shape: Shape, num_rows: int, num_queries: int, start: int) -> list[Step]:
    """Enough of them that their keys and values do not stay in the cache."""
    num_bytes = num_rows * shape.kv_bytes(start + num_queries)
    copies = max(1, min(32, int(CACHE_BYTES / num_bytes)))
    return [Step(shape, num_rows, num_queries, start) for _ in range(copies)]


def flash3_us(steps: list[Step]) -> float:
    """FlashAttention 3 over the same pages, as vLLM packs it."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    def call(step: Step) -> object:
        return flash_attn_varlen_func(
            q=step.q, k=step.k_cache, v=step.v_cache, out=step.out, cu_seqlens_q=step.query_start,
            max_seqlen_q=step.num_queries, seqused_k=step.kv_lens, max_seqlen_k=step.kv_len,
            softmax_scale=step.scale, causal=True, block_table=step.block_table[1:], fa_version=3,
        )  # fmt: skip

    return time_us([partial(call, step) for step in steps])


def flash_us(shape: Shape, num_rows: int, num_queries: int) -> float:
    """torch's flash attention over whole prompts."""

    def heads(num_heads: int) -> torch.Tensor:
        return torch.randn(num_rows, num_heads, num_queries, shape.head_dim, device=DEVICE, dtype=DTYPE)

    q, k, v = heads(shape.num_heads), heads(shape.num_kv_heads), heads(shape.num_kv_heads)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return time_us(
            [
                lambda: torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                )
            ]
        )


def causal_flops(shape: Shape, num_queries: int, start: int) -> float:
    keys_seen = num_queries * start + num_queries * (num_queries + 1) / 2
    return 4.0 * keys_seen * shape.num_heads * shape.head_dim


def run(report: Report) -> None:
    for name, shape in SHAPES.items():
        for batch, kv_len in DECODE:
            run_decode(report, f"decode/{name}/b{batch}/{kv_len}", shape, batch, 1, kv_len)
        run_decode(report, f"verify4/{name}/b64/8192", shape, 64, 4, 8192)
        for load, (num_rows, num_queries, start) in PREFILL.items():
            run_prefill(report, f"prefill/{name}/{load}", shape, num_rows, num_queries, start)


def run_decode(report: Report, entry: str, shape: Shape, batch: int, num_queries: int, kv_len: int) -> None:
    if not report.wants(entry):
        return
    start = kv_len - num_queries
    steps = steps_of(shape, batch, num_queries, start)
    us = time_us([s.attend for s in steps])
    flops = batch * causal_flops(shape, num_queries, start)
    report.add(entry, us, batch * shape.kv_bytes(kv_len), flops, peers_of(steps))


def run_prefill(
    report: Report, entry: str, shape: Shape, num_rows: int, num_queries: int, start: int
) -> None:
    if not report.wants(entry):
        return
    steps = steps_of(shape, num_rows, num_queries, start)
    us = time_us([s.attend for s in steps])
    num_bytes = 4.0 * num_rows * num_queries * shape.num_heads * shape.head_dim
    num_bytes += num_rows * shape.kv_bytes(start + num_queries)
    flops = num_rows * causal_flops(shape, num_queries, start)
    peers = peers_of(steps)
    if start == 0:
        peers["torch flash"] = partial(flash_us, shape, num_rows, num_queries)
    report.add(entry, us, num_bytes, flops, peers)


def peers_of(steps: list[Step]) -> dict[str, Callable[[], float]]:
    return {"flash3": partial(flash3_us, steps)} if is_vllm_installed() else {}


if __name__ == "__main__":
    raise SystemExit(run_alone(__doc__, run))
