"""`headway generate`: completes one prompt, streaming the text to stdout."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headway.cli.console import open_llm, speed_line
from headway.cli.flags import add_engine_flags, add_sampling_flags, given_params
from headway.errors import RequestError
from headway.request import SamplingParams

if TYPE_CHECKING:
    from headway.llm import LLM

DEFAULT_MAX_TOKENS = 256


def add_to(commands: Any, *, shows_all: bool) -> None:
    parser = commands.add_parser(
        "generate",
        help="complete a prompt",
        description='Completes a prompt and streams the text: headway generate "def fib(n):"',
    )
    parser.add_argument("prompt", nargs="?", help="text to complete; left out or -: read from stdin")
    parser.add_argument("--echo", action="store_true", help="print the prompt before its completion")
    parser.add_argument("--quiet", action="store_true", help="no speed line on stderr")
    parser.add_argument("--verbose", action="store_true", help="log to stderr even when it is no terminal")
    add_sampling_flags(parser, shows_all=shows_all)
    add_engine_flags(parser, shows_all=shows_all)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    changes = {"max_tokens": DEFAULT_MAX_TOKENS, **given_params(args)}
    SamplingParams(**changes)  # refuse bad values before a model is loaded
    prompt = read_prompt(args.prompt)
    with open_llm(args, max_num_seqs=1) as llm:
        params = replace(llm.get_default_sampling_params(), **changes)
        if args.echo:
            print(prompt, end="", flush=True)
        print_stream(llm, prompt, params, is_quiet=args.quiet)
    return 0


def read_prompt(argument: str | None) -> str:
    if argument is None and sys.stdin.isatty():
        raise RequestError("prompt", None, "given as an argument or on stdin")
    prompt = sys.stdin.read() if argument in (None, "-") else argument
    if not prompt:
        raise RequestError("prompt", prompt, "at least one character")
    return prompt


def print_stream(llm: LLM, prompt: Any, params: SamplingParams, *, is_quiet: bool) -> str:
    """Streams one completion to stdout and its speed to stderr; returns its text."""
    pieces = []
    for delta in llm.stream(prompt, params):
        pieces.append(delta.text)
        print(delta.text, end="", flush=True)
        if delta.metrics is not None:
            print(flush=True)
            if not is_quiet:
                print(speed_line(delta.metrics), file=sys.stderr)
    return "".join(pieces)
