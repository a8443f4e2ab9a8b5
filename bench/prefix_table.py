"""Puts reports of bench/prefix.py beside each other in one table: Headway's, and a peer's where there is one.

usage: python -m bench.prefix_table OURS.json [THEIRS.json]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ABSENT = "-"


def table(reports: Sequence[dict[str, Any]]) -> list[str]:
    """A line a prefix length, then the chat and what the cache costs. What a report lacks, its part having failed or
    been cut short, is a dash."""
    names = [report["engine"] for report in reports]
    heads = [f"{name}: {what}" for name in names for what in ("first token, ms", "computed tokens")]
    lines = [
        f"| 1st / 2nd / 3rd sight of | {' | '.join(heads)} |",
        "|---|" + "---|" * len(heads),
    ]
    sights = [{row["prefix_tokens"]: row for row in report.get("sights", [])} for report in reports]
    for length in sorted(set().union(*sights)):
        cells = [
            slashed(rows[length][key]) if length in rows else ABSENT
            for rows in sights
            for key in ("ttft_ms", "computed_tokens")
        ]
        lines.append(f"| {length:,} tokens | {' | '.join(cells)} |")
    chats = [cell for report in reports for cell in chat_cells(report)]
    lines.append(f"| chat: mean, and computed over the ideal | {' | '.join(chats)} |")
    costs = [cell for report in reports for cell in (overhead_cell(report), "")]
    lines.append(f"| prefill / decode without reuse | {' | '.join(costs)} |")
    return lines


def slashed(values: Sequence[float]) -> str:
    return " / ".join(f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" for value in values)


def chat_cells(report: dict[str, Any]) -> tuple[str, str]:
    if "chat" not in report:
        return ABSENT, ABSENT
    chat = report["chat"]
    return f"{chat['ttft_ms_mean']:.4g}", f"{chat['computed_over_ideal']:.3f} of {chat['ideal_tokens']:,}"


def overhead_cell(report: dict[str, Any]) -> str:
    if "overhead" not in report:
        return ABSENT
    return " / ".join(f"{100 * report['overhead'][name]['share']:+.2f} %" for name in ("prefill", "decode"))


def main() -> None:
    reports = [json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]
    print(f"{reports[0]['model']} on {reports[0]['machine']}\n")
    print("\n".join(table(reports)))


if __name__ == "__main__":
    main()
