"""`headway bench latency|throughput|serve|startup`: options and JSON keys are those of vLLM's tools of these names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headway.cli.bench import latency, serve, startup, throughput
from headway.cli.parser import Parser

KINDS = (latency, throughput, serve, startup)


def add_to(commands: Any, *, shows_all: bool) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure latency, throughput, a running server, start-up",
        description="Prints one JSON object. Without a kind: latency. headway bench KIND --help lists its flags.",
    )
    assert isinstance(parser, Parser)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=Parser)
    for kind in KINDS:
        kind.add_to(kinds, shows_all=shows_all)
    parser.add_argument("--help-all", action="help", help="as --help")
    parser.fill_in = _fill_in


def _fill_in(words: Sequence[str]) -> list[str]:
    """`headway bench --batch-size 1` is a latency."""
    is_bare = not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--help-all"))
    return ["latency", *words] if is_bare else list(words)


__all__ = ["add_to"]
