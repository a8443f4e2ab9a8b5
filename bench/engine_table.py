"""Puts reports of bench/engine.py beside each other: Headway's figures, a peer's, the ratio and the goal.

usage: python -m bench.engine_table OURS.json THEIRS.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Times faster than the peer, by model: what this project set out to reach.
DECODE_GOALS = {
    "small": (3.0, 3.0, 3.0, 3.0),
    "nano9b": (1.15, 1.2, 1.4, 1.7),
    "nano30b": (1.5, 1.3, 1.2, None),
}
GOALS = {
    "small": {"mixed_out_tok_s": 2.0, "prefill_tok_s": 1.1, "ttft_ms_median": 4.0},
    "nano9b": {"mixed_out_tok_s": 1.3, "prefill_tok_s": 1.05, "ttft_ms_median": 3.0},
}
BATCHES = (1, 8, 64, 256)


@dataclass(frozen=True)
class Line:
    figure: str
    ours: float
    theirs: float
    goal: float | None

    @property
    def times_faster(self) -> float:
        """Rates are better when larger, times when smaller."""
        return self.ours / self.theirs if self.figure.endswith("tok_s") else self.theirs / self.ours

    def __str__(self) -> str:
        goal = "-" if self.goal is None else f"{self.goal:g}"
        return f"| {self.figure} | {self.ours:,.6g} | {self.theirs:,.6g} | {self.times_faster:.2f} | {goal} |"


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> list[Line]:
    model = next((name for name in DECODE_GOALS if name in str(ours["model"])), "")
    goals: dict[str, float | None] = dict(GOALS.get(model, {}))
    goals |= {
        f"decode_step_ms_b{batch}": goal
        for batch, goal in zip(BATCHES, DECODE_GOALS.get(model, (None,) * 4), strict=True)
    }
    figures = [
        *(f"decode_step_ms_b{batch}" for batch in BATCHES),
        "ttft_ms_median",
        "prefill_tok_s",
        "mixed_out_tok_s",
    ]
    figures.append("start_to_first_token_s")
    return [
        Line(figure, ours[figure], theirs[figure], goals.get(figure))
        for figure in figures
        if figure in ours and figure in theirs
    ]


def main() -> None:
    ours, theirs = (json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:3])
    print(f"{ours['model']} on {ours['machine']}\n")
    print(f"| figure | {ours['engine']} | {theirs['engine']} | times faster | goal |\n|---|---|---|---|---|")
    print("\n".join(str(line) for line in compare(ours, theirs)))


if __name__ == "__main__":
    main()
