"""The command line that the benchmarks of one kind share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.ops.report import Report
from bench.ops.timing import bytes_per_us


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--commit", default="unknown", help="of the tree under test")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="names, or their beginnings up to a slash"
    )


def run_alone(doc: str | None, run: Callable[[Report], None], argv: Sequence[str] | None = None) -> int:
    """One benchmark by itself; exit status."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    report = Report(bytes_per_us(), tuple(arguments.only), arguments.out, arguments.commit)
    run(report)
    report.write()
    return 0
