"""Puts reports of bench/engine.py beside each other: Headway's figures, a peer's, the ratio and the goal; below, of
Headway alone, idle time and start-up.

usage: python -m bench.engine_table OURS.json THEIRS.json [OURS.json THEIRS.json ...]
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
MAX_IDLE_PERCENT = {"small": 3.0, "nano9b": 1.0}
MAX_ARRIVALS_IDLE_PERCENT = 5.0
MAX_STARTUP_S = {"nano9b": 20.0}


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
    model = model_of(ours)
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
        "startup_s",
        "process_to_first_token_s",
    ]
    return [
        Line(figure, ours[figure], theirs[figure], goals.get(figure))
        for figure in figures
        if figure in ours and figure in theirs
    ]


def alone(ours: dict[str, Any]) -> list[str]:
    """Idle shares and start-up, with the most they may be."""
    model = model_of(ours)
    lines = [
        limit_line(f"idle share, decode batch {batch} (%)", idle_percent(steady), MAX_IDLE_PERCENT.get(model))
        for batch in BATCHES
        if (steady := ours.get(f"decode_b{batch}")) is not None
    ]
    if "arrivals" in ours:
        percent = idle_percent(ours["arrivals"])
        lines.append(limit_line("idle share, steady arrivals (%)", percent, MAX_ARRIVALS_IDLE_PERCENT))
    if "mixed" in ours:
        lines.append(limit_line("idle share, mixed (%)", idle_percent(ours["mixed"]), None))
    if "process_to_first_token_s" in ours:
        what = f"process to first token (s), weights: {ours['load_format']}"
        lines.append(limit_line(what, ours["process_to_first_token_s"], MAX_STARTUP_S.get(model)))
    return lines


def idle_percent(figures: dict[str, float]) -> float:
    return 100.0 * figures["idle_share"]


def limit_line(what: str, value: float, limit: float | None) -> str:
    return f"| {what} | {value:.4g} | {'-' if limit is None else f'{limit:g}'} |"


def model_of(report: dict[str, Any]) -> str:
    return next((name for name in DECODE_GOALS if name in str(report["model"])), "")


def tables(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    lines = [f"{ours['model']} on {ours['machine']}", ""]
    lines += [
        f"| figure | {ours['engine']} | {theirs['engine']} | times faster | goal |",
        "|---|---|---|---|---|",
    ]
    lines += [str(line) for line in compare(ours, theirs)]
    lines += ["", f"| {ours['engine']} alone | | at most |", "|---|---|---|", *alone(ours)]
    for report in (ours, theirs):
        if report["cut_short"] or report["failed"]:
            lines += ["", f"{report['engine']}: cut short {report['cut_short']}, failed {report['failed']}"]
    return "\n".join(lines)


def main() -> None:
    reports = [json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]
    pairs = zip(reports[::2], reports[1::2], strict=True)
    print("\n\n".join(tables(ours, theirs) for ours, theirs in pairs))


if __name__ == "__main__":
    main()
