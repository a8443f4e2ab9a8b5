"""Reads what `python -m bench.ops` wrote and puts beside every figure that was set what was reached, a row each.

usage: python -m bench.ops_goals OPS.json [OPS.json ...]     several files are read as one run

In bold what misses its goal. "(recorded)" follows a ratio to a peer's time of another sitting.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

Run = Mapping[str, Any]
Read = Callable[[Run, str], float]

MODELS = ("nano30b", "nano9b", "granite_tiny", "mamba2_2.7b")
PROMPTS = ("1x512", "1x4096", "8x2048", "ragged32_16k")
ATTENTION = ("nano30b", "nano9b", "gqa4")


def peer_ratio(run: Run, entry: str, peer: str = "vllm") -> float:
    """The peer's time over ours."""
    peers = run[entry].get("peers", {})
    return peers[peer if peer in peers else f"{peer}, another sitting"]["times_slower"]


def share_of_peer(run: Run, entry: str) -> float:
    """Our time over the peer's."""
    return 1 / peer_ratio(run, entry)


def over_floor(run: Run, entry: str) -> float:
    return run[entry]["over_floor"]


def share_of_copy(run: Run, entry: str) -> float:
    return run[entry]["gb_per_s"] / run["copy_gb_per_s"]


def over_plain_copy(run: Run, entry: str) -> float:
    """Over a kernel that does no more than read and write as many bytes."""
    peers = run[entry]["peers"]
    return 1 / next(time["times_slower"] for peer, time in peers.items() if "as many bytes" in peer)


def time_us(run: Run, entry: str) -> float:
    return run[entry]["us"]


def over_one_token(run: Run, entry: str) -> float:
    return run[entry]["us"] / run[entry.replace("_4_tokens", "")]["us"]


@dataclass(frozen=True)
class Figure:
    """A row. `loads` have a goal each, the least or the most that is wanted; a figure without goals only explains."""

    title: str
    read: Read
    entry: str  # with {model} and {load}
    loads: tuple[str, ...]
    at_least: tuple[float, ...] | None = None
    at_most: tuple[float, ...] | None = None
    models: tuple[str, ...] = MODELS

    def row(self, run: Run) -> str:
        goals = self.at_least or self.at_most
        goal = "" if goals is None else " / ".join(f"{goal:g}" for goal in dict.fromkeys(goals))
        reached = ((model, self._cells(run, model)) for model in self.models)
        cells = (f"{model} {' / '.join(cells)}" for model, cells in reached if any(cells))
        return f"| {self.title} | {goal} | {'; '.join(cells)} |"

    def _cells(self, run: Run, model: str) -> list[str]:
        return [
            self._cell(run, self.entry.format(model=model, load=load), i) for i, load in enumerate(self.loads)
        ]

    def _cell(self, run: Run, entry: str, load_idx: int) -> str:
        """Empty where the run has no such entry, or its peer left a reason instead of a time."""
        try:
            value = self.read(run, entry)
        except (KeyError, StopIteration):
            return ""
        text = f"{value:.3g}"
        is_missed = (self.at_least is not None and value < self.at_least[load_idx]) or (
            self.at_most is not None and value > self.at_most[load_idx]
        )
        recorded = " (recorded)" if self._is_recorded(run, entry) else ""
        return (f"**{text}**" if is_missed else text) + recorded

    def _is_recorded(self, run: Run, entry: str) -> bool:
        uses_peer = self.read in (peer_ratio, share_of_peer)
        return uses_peer and any("another sitting" in peer for peer in run[entry].get("peers", {}))


FIGURES = (
    Figure(
        "chunked scan, times faster than the peer's kernels, 1x512 / 1x4096 / 8x2048 / 32 ragged rows",
        peer_ratio, "ssd/{model}/{load}", PROMPTS, at_least=(3.0,) * 4,
    ),
    Figure(
        "the same, over its bytes, 1x4096 / 8x2048 / ragged",
        over_floor, "ssd/{model}/{load}", PROMPTS[1:], at_most=(2.5,) * 3,
    ),
    Figure(
        "convolution, over its bytes, 1x512 / 1x4096 / 8x2048 / ragged",
        over_floor, "conv/{model}/{load}", PROMPTS, at_most=(1.25,) * 4,
    ),
    Figure(
        "the same, over a kernel that only copies as many bytes",
        over_plain_copy, "conv/{model}/{load}", PROMPTS,
    ),
    Figure(
        "convolution, scan and gated norm at 8x2048, times faster than the peer's",
        peer_ratio, "chain/{model}/{load}", ("8x2048",), at_least=(3.0,),
    ),
    Figure(
        "decode step, over the time of the peer's three kernels, batch 1 / 8",
        share_of_peer, "decode_window/{model}/{load}/fp32", ("b1", "b8"), at_most=(0.67, 0.6),
    ),
    Figure(
        "decode step, over the bytes of a state in place, batch 64 / 256",
        over_floor, "decode_window/{model}/{load}/fp32", ("b64", "b256"), at_most=(0.62, 0.62),
    ),
    Figure(
        "four tokens a row, batch 64, over one token",
        over_one_token, "decode_window_4_tokens/{model}/{load}/fp32", ("b64",), at_most=(1.3,),
    ),
    Figure(
        "decode attention, 64 x 8,192 keys, share of copy bandwidth",
        share_of_copy, "decode/{model}/{load}", ("b64/8192",), at_least=(0.85,), models=ATTENTION,
    ),
    Figure(
        "the same, of FlashAttention 3's speed",
        partial(peer_ratio, peer="flash3"), "decode/{model}/{load}", ("b64/8192",), at_least=(0.95,),
        models=ATTENTION,
    ),
    Figure(
        "attention of prompts, 8,192 tokens, of the speed of torch's flash attention",
        partial(peer_ratio, peer="torch flash"), "prefill/{model}/{load}", ("1x8192",), at_least=(0.95,),
        models=(*ATTENTION, "mha"),
    ),
    Figure(
        "experts, times faster than the peer's, batch 1 / 8 / 64",
        peer_ratio, "experts/{model}/{load}", ("b1", "b8", "b64"), at_least=(1.5, 1.4, 1.2), models=("nano30b",),
    ),
    Figure(
        "the same, share of copy bandwidth on the experts touched",
        share_of_copy, "experts/{model}/{load}", ("b1", "b8", "b64"), at_least=(0.7,) * 3, models=("nano30b",),
    ),
    Figure(
        "sampler with top-k and top-p, 64 x 131,072, us",
        time_us, "sample/{model}/{load}", ("b64/v131072",), at_most=(60.0,), models=("top_k_top_p",),
    ),
    Figure(
        "greedy, over reading the logits once",
        over_floor, "sample/{model}/{load}", ("b64/v131072",), at_most=(1.15,), models=("greedy",),
    ),
)  # fmt: skip


def rows(run: Run) -> Iterator[str]:
    yield "| figure | goal | reached |"
    yield "|---|---|---|"
    yield from (figure.row(run) for figure in FIGURES)


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    run: dict[str, Any] = {}
    for path in paths:
        run |= json.loads(Path(path).read_text())
    print("\n".join(rows(run)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
