"""Entry point: parses, runs the subcommand, turns errors into one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from headway import __version__
from headway.cli import bench, chat, doctor, generate, serve
from headway.cli.parser import Parser, parse
from headway.errors import ConfigError, HeadwayError, MemoryBudgetError, ModelLoadError, RequestError

EXIT_FAILURE, EXIT_USAGE, EXIT_NO_MEMORY, EXIT_NO_MODEL, EXIT_INTERRUPTED = 1, 2, 3, 4, 130
COMMANDS = (generate, chat, serve, bench, doctor)


def build_parser(*, shows_all: bool = False) -> Parser:
    """All subcommands. shows_all lists advanced flags too."""
    parser = Parser(
        prog="headway", description="Serves hybrid language models. Without --model: the embedded one."
    )
    parser.add_argument("--version", action="version", version=f"headway {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.add_to(commands, shows_all=shows_all)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(shows_all="--help-all" in words)
    try:
        args = parse(parser, words)
        return int(args.run(args) or 0)
    except HeadwayError as error:
        print(f"headway: error: {error}", file=sys.stderr)
        return _exit_code(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _drop_stdout()
        return 0
    except OSError as error:  # a full disk, a report that cannot be written
        print(f"headway: error: {error}", file=sys.stderr)
        _drop_stdout()
        return EXIT_FAILURE


def _drop_stdout() -> None:
    """What is still buffered goes nowhere: flushing it at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_code(error: HeadwayError) -> int:
    if isinstance(error, (RequestError, ConfigError)):
        return EXIT_USAGE
    if isinstance(error, MemoryBudgetError):
        return EXIT_NO_MEMORY
    return EXIT_NO_MODEL if isinstance(error, ModelLoadError) else EXIT_FAILURE
