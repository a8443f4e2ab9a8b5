"""What the prefix cache's tier in host memory gives: the first token of a prefix that left the device, beside computing
it and beside finding it on the device; how fast copies run, and what they cost the steps beside them.

- sights: a prompt of each length, cold; 64 tokens longer when others have pushed it out; and again from the device.
- copies: 2,048 tokens' keys and values, and one state, out and back, alone on the machine.
- beside: decode steps of 16 rows, alone and with copies of either direction running all the while.

usage: python -m bench.host_tier nano9b --out host_tier.json [--lengths 2048 8192] [--host-gib 16]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.sides import greedy, model_path
from headway import LLM, SamplingParams
from headway.engine.host_tier import HostTier
from headway.models.caches import cache_bytes

LENGTHS = (2048, 8192)
SUFFIX_LEN, NUM_PREFIXES = 64, 3
NUM_ROWS, ROW_LEN, NUM_NEW, NUM_TIMED = 16, 64, 200, 150
COPIED_BLOCKS, NUM_REPEATS = 128, 20


class HostTierBench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.draws = random.Random(1)
        longest = max(args.lengths) + SUFFIX_LEN + 16
        self.llm = LLM(
            model_path(args.model),
            load_format="dummy",
            device=args.device,
            max_model_len=longest,
            max_num_seqs=NUM_ROWS,
            kv_cache_memory_bytes=int(args.cache_gib * 2**30),
            snapshot_memory_bytes=int(args.snapshot_gib * 2**30),
            prefix_host_memory_bytes=int(args.host_gib * 2**30),
            snapshot_stride_tokens=0,
        )
        self.engine = self.llm._engine
        parts, window = self.llm._parts, self.engine._runner._caches.state_window
        self.block_size = parts.memory.block_size
        self.bytes_of = cache_bytes(parts.model_config, self.block_size, parts.dtype, window)

    def tokens(self, num_tokens: int) -> list[int]:
        return [self.draws.randrange(10, self.llm.vocab_size - 10) for _ in range(num_tokens)]

    def first_token_ms(self, prompt: list[int]) -> tuple[float, int]:
        begin_s = time.perf_counter()
        output = self.llm.generate([prompt], greedy(SamplingParams, 2))[0]
        assert output.metrics.first_token_s is not None
        return 1e3 * (output.metrics.first_token_s - begin_s), output.num_cached_tokens or 0

    def push_out(self, num_tokens: int) -> None:
        """Other prompts, until the device has none of what it held."""
        num_blocks = self.engine.ledger.stats().blocks_total
        num_others = 1 + num_blocks * self.block_size // num_tokens
        for _ in range(num_others):
            self.first_token_ms(self.tokens(num_tokens))

    def sights(self, length: int) -> dict[str, Any]:
        times: dict[str, list[float]] = {"cold": [], "host": [], "device": []}
        found: dict[str, list[int]] = {"cold": [], "host": [], "device": []}
        for _ in range(NUM_PREFIXES):
            prefix = self.tokens(length)
            for sight in times:
                if sight == "host":
                    self.push_out(length)
                suffix = [] if sight == "cold" else self.tokens(SUFFIX_LEN)
                ms, num_cached = self.first_token_ms(prefix + suffix)
                times[sight].append(ms)
                found[sight].append(num_cached)
        return {
            "prefix_tokens": length,
            "ttft_ms": {sight: round(statistics.median(all_ms), 3) for sight, all_ms in times.items()},
            "cached_tokens": found,
        }

    def scratch(self) -> HostTier:
        """A tier of the same caches beside the engine's, whose books know nothing of it."""
        runner = self.engine._runner
        sizes: Any = SimpleNamespace(num_host_blocks=COPIED_BLOCKS, num_host_slots=1)
        return HostTier(runner._caches, runner._buffers.mirror.state_base, sizes, runner._device)

    def copies(self) -> dict[str, Any]:
        tier = self.scratch()
        nothing = np.zeros((0, 2), np.int32)
        ids = np.arange(1, COPIED_BLOCKS + 1, dtype=np.int32)
        kinds = {
            "blocks": (np.stack([ids, ids], axis=1), nothing, COPIED_BLOCKS * self.bytes_of.per_block),
            "state": (nothing, np.ones((1, 2), np.int32), self.bytes_of.per_slot),
        }
        report: dict[str, Any] = {}
        for name, (blocks, slots, num_bytes) in kinds.items():
            for is_out in (True, False):
                transfer: Any = SimpleNamespace(is_out=is_out, blocks=blocks, slots=slots)
                times_ms, calls_us = [], []
                for _ in range(NUM_REPEATS):
                    begin_s = time.perf_counter()
                    tier.begin(transfer)
                    calls_us.append(1e6 * (time.perf_counter() - begin_s))
                    while not tier.take_finished(is_out):
                        time.sleep(0)
                    times_ms.append(1e3 * (time.perf_counter() - begin_s))
                took_ms = statistics.median(times_ms)
                report[f"{name} {'out' if is_out else 'back'}"] = {
                    "mib": round(num_bytes / 2**20, 1),
                    "ms": round(took_ms, 3),
                    "gb_per_s": round(num_bytes / took_ms / 1e6, 1),
                    "call_us": round(statistics.median(calls_us), 1),
                }
        tier.close()
        return report

    def beside(self) -> dict[str, Any]:
        """Copies back go to the dummy block and slot, which nobody reads."""
        tier, report = self.scratch(), {}
        for way, is_out in {"alone": None, "out": True, "back": False, "alone again": None}.items():
            copier = Copier(tier, is_out)
            prompts = [self.tokens(ROW_LEN) for _ in range(NUM_ROWS)]
            params = greedy(SamplingParams, NUM_NEW)
            self.llm.generate(prompts, params, on_step=copier.on_step, use_prefix_cache=False)
            marks = copier.marks_s[-NUM_TIMED:]
            steps_ms = [1e3 * (end_s - begin_s) for begin_s, end_s in pairwise(marks)]
            report[way] = {"step_ms": round(statistics.median(steps_ms), 4), "copies": copier.num_copies}
            copier.drain()
        tier.close()
        return report


class Copier:
    """Keeps two copies on their way while steps run; is_out: None for no copies at all."""

    def __init__(self, tier: HostTier, is_out: bool | None) -> None:
        ids = np.arange(COPIED_BLOCKS, dtype=np.int32)
        blocks = np.stack([ids, ids if is_out else np.zeros_like(ids)], axis=1)
        self.transfer: Any = SimpleNamespace(is_out=is_out, blocks=blocks, slots=np.zeros((1, 2), np.int32))
        self.tier = tier
        self.num_copies = self.num_pending = 0
        self.marks_s: list[float] = []

    def on_step(self, _: object) -> None:
        self.marks_s.append(time.perf_counter())
        if self.transfer.is_out is None:
            return
        self.num_pending -= self.tier.take_finished(self.transfer.is_out)
        while self.num_pending < 2:
            self.tier.begin(self.transfer)
            self.num_pending += 1
            self.num_copies += 1

    def drain(self) -> None:
        while self.num_pending:
            self.num_pending -= self.tier.take_finished(self.transfer.is_out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a file of bench/models (small, nano9b) or a checkpoint folder")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument(
        "--cache-gib", type=float, default=4.5, help="so little that prefixes are pushed out soon"
    )
    parser.add_argument("--snapshot-gib", type=float, default=1.25)
    parser.add_argument("--host-gib", type=float, default=12)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    bench = HostTierBench(args)
    for length in args.lengths:
        bench.first_token_ms(bench.tokens(length + SUFFIX_LEN))
    report: dict[str, Any] = {"model": args.model, **bench.llm.describe()}
    if torch.cuda.is_available():
        report["machine"] = torch.cuda.get_device_name()

    def write() -> None:
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    report["sights"] = []
    for length in args.lengths:
        report["sights"].append(bench.sights(length))
        write()
    report["stats"] = {name: count for name, count in bench.llm.prefix_cache_stats().items() if count}
    bench.llm.reset_prefix_cache()
    report["copies"] = bench.copies()
    write()
    report["beside"] = bench.beside()
    write()
    print(json.dumps(report))
    bench.llm.close()


if __name__ == "__main__":
    main()
