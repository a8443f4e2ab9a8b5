"""argparse with one-line errors, nearest-flag hints, `--a_b` for `--a-b`, and advanced flags on demand."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from headway.fields import nearest


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit code 2."""

    def __init__(self, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} ({self.prog} --help lists the flags)", file=sys.stderr)
        sys.exit(2)

    @property
    def flags(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    @property
    def subparsers(self) -> dict[str, Parser]:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}


def parse(parser: Parser, words: list[str]) -> argparse.Namespace:
    """Parses words; an unknown flag names the nearest one of its subcommand."""
    num_flags = words.index("--") if "--" in words else len(words)
    dashed = [_dashed(word) for word in words[:num_flags]]
    args, unknown = parser.parse_known_args(dashed + words[num_flags:])
    if unknown:
        command = parser.subparsers[args.command]
        hint = nearest(unknown[0].split("=")[0], command.flags)
        command.error(f"unknown argument {unknown[0]}{', ' + hint if hint else ''}")
    return args


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value
