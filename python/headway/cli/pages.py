"""Tables of flags in docs/benchmarks.md, made of the parsers: `python -m headway.cli.pages docs/benchmarks.md`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from headway.cli.main import build_parser

_TABLE = re.compile(r"<!-- flags: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def flags_of(kind: str) -> str:
    """Of `headway bench KIND`, without the engine's, which docs/settings.md has."""
    parser = build_parser().subparsers["bench"].subparsers[kind]
    own = [group for group in parser._action_groups if group.title != "engine"]
    rows = [_row(action) for group in own for action in group._group_actions if action.option_strings]
    return "\n".join(["| flag | meaning |", "|---|---|", *filter(None, rows)])


def _row(action: argparse.Action) -> str:
    if "--help" in action.option_strings or "--help-all" in action.option_strings:
        return ""
    value = action.metavar or ("|".join(action.choices) if action.choices else "")
    name = f"{action.option_strings[0]} {value}".strip().replace("|", r"\|")
    return f"| `{name}` | {action.help} |"


def renew(page: str) -> str:
    """The page with every table as the code has it. Raises KeyError for a kind that there is not."""
    return _TABLE.sub(lambda found: f"<!-- flags: {found[1]} -->\n{flags_of(found[1])}\n<!-- end -->", page)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(renew(path.read_text(encoding="utf-8")), encoding="utf-8")
