"""argparse with one-line errors, nearest-flag hints, `--a_b` for `--a-b`, and advanced flags on demand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from headway.fields import nearest


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit code 2.

    Attributes:
        fill_in: what to parse in place of the words that were typed.
    """

    def __init__(self, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.fill_in: Callable[[Sequence[str]], list[str]] = list

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(None if args is None else self.fill_in(args), namespace)

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

    def chosen(self, args: argparse.Namespace) -> Parser:
        """Of the subcommand that was given, and of its own, if it has some."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                name: str = getattr(args, action.dest)
                return self.subparsers[name].chosen(args)
        return self


def parse(parser: Parser, words: list[str]) -> argparse.Namespace:
    """Parses words; an unknown flag names the nearest one of its subcommand."""
    num_flags = words.index("--") if "--" in words else len(words)
    dashed = [_dashed(word) for word in words[:num_flags]]
    args: argparse.Namespace
    args, unknown = parser.parse_known_args(dashed + words[num_flags:])
    if unknown:
        command = parser.chosen(args)
        hint = nearest(unknown[0].split("=")[0], command.flags)
        command.error(f"unknown argument {unknown[0]}{', ' + hint if hint else ''}")
    return args


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value
