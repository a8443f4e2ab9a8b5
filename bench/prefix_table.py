"""Puts two reports of bench/prefix.py beside each other: Headway's and a peer's.

usage: python -m bench.prefix_table OURS.json THEIRS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def sight_lines(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    lines = [
        "| shared tokens | first token, ms: 1st / 2nd / 3rd sight | computed | peer, ms | peer computed |",
        "|---|---|---|---|---|",
    ]
    for mine, other in zip(ours["sights"], theirs["sights"], strict=True):
        assert mine["prefix_tokens"] == other["prefix_tokens"]
        cells = [slashed(row[key]) for row in (mine, other) for key in ("ttft_ms", "computed_tokens")]
        lines.append(f"| {mine['prefix_tokens']:,} | " + " | ".join(cells) + " |")
    return lines


def slashed(values: list[float]) -> str:
    return " / ".join(f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" for value in values)


def chat_lines(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    mine, other = ours["chat"], theirs["chat"]
    return [
        f"| chat | {ours['engine']} | {theirs['engine']} |",
        "|---|---|---|",
        f"| computed prompt tokens over the ideal {mine['ideal_tokens']:,} | "
        f"{mine['computed_over_ideal']:.3f} | {other['computed_over_ideal']:.3f} |",
        f"| mean time to first token, ms | {mine['ttft_ms_mean']:.2f} | {other['ttft_ms_mean']:.2f} |",
    ]


def main() -> None:
    ours, theirs = (json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:3])
    print(f"{ours['model']} on {ours['machine']}: {ours['engine']} and {theirs['engine']}\n")
    print("\n".join(sight_lines(ours, theirs)) + "\n")
    print("\n".join(chat_lines(ours, theirs)))


if __name__ == "__main__":
    main()
