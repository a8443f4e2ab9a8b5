"""What the benchmarks share: flags with limits, percentiles, reports."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PERCENTILES = (10, 25, 50, 75, 90, 99)


class CountFlag(NamedTuple):
    """A flag for a whole number."""

    name: str
    low: int
    default: int
    meaning: str


def add_counts(group: Any, *flags: CountFlag) -> None:
    """To a parser or to a group of one."""
    for flag in flags:
        text = f"{flag.meaning} ({flag.default})"
        group.add_argument(flag.name, type=at_least(flag.low), default=flag.default, metavar="N", help=text)


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type."""

    def read(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    read.__name__ = "integer"  # argparse names it where the text is none
    return read


def between(low: float, high: float) -> Callable[[str], float]:
    """An argparse type; NaN is not between anything."""

    def read(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be in [{low:g}, {high:g}], got {text}")
        return value

    read.__name__ = "number"
    return read


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Interpolated, by percent."""
    import numpy as np

    return dict(zip(map(str, PERCENTILES), np.percentile(values, PERCENTILES).tolist(), strict=True))


def write_report(report: dict[str, Any], output_json: str | None) -> None:
    """One line on stdout, and in a file where one is named."""
    text = json.dumps(report)
    print(text, flush=True)
    if output_json:
        Path(output_json).write_text(text + "\n", encoding="utf-8")
