"""`headway chat`: a conversation in the terminal, with a model of its own or with a running server.

Models without a chat template continue the text instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headway.cli.console import open_llm
from headway.cli.flags import (
    API_KEY_VARIABLE,
    add_engine_flags,
    add_sampling_flags,
    given_params,
    given_settings,
)
from headway.cli.generate import print_stream
from headway.errors import ConfigError, RequestError, ServerError
from headway.fields import flag
from headway.request import SamplingParams

if TYPE_CHECKING:
    from headway.llm import LLM

DEFAULT_MAX_TOKENS = 512
Message = dict[str, str]


def add_to(commands: Any, *, shows_all: bool) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description="A conversation: one line a turn, /clear forgets it, /exit or end of input leaves.",
    )
    parser.add_argument(
        "--system", "--system-prompt", metavar="TEXT", help="system message at the start of the conversation"
    )
    parser.add_argument("-q", "--quick", metavar="TEXT", help="ask this one thing and leave")
    parser.add_argument("--verbose", action="store_true", help="log to stderr even when it is no terminal")
    group = parser.add_argument_group("server")
    group.add_argument(
        "--url", help="talk to the server there, such as http://127.0.0.1:8000/v1; no model is loaded"
    )
    group.add_argument("--model-name", metavar="NAME", help="unset: the first that the server lists")
    group.add_argument("--api-key", metavar="KEY", help=f"unset: {API_KEY_VARIABLE} of the environment")
    add_sampling_flags(parser, shows_all=shows_all)
    add_engine_flags(parser, shows_all=shows_all)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    changes = given_params(args)
    SamplingParams(
        **{"max_tokens": DEFAULT_MAX_TOKENS, **changes}
    )  # refuse bad values before a model is loaded
    if args.url is not None:
        return _with_server(args, changes)
    for name in ("model_name", "api_key"):
        if getattr(args, name) is not None:
            raise ConfigError(f"{flag(name)} goes with --url")
    with open_llm(args, max_num_seqs=1) as llm:
        if args.quick is None and not llm.has_chat_template and sys.stderr.isatty():
            print("this model has no chat template: it continues the text", file=sys.stderr)
        changes = {"max_tokens": DEFAULT_MAX_TOKENS, **changes}
        params = replace(llm.get_default_sampling_params(), **changes)
        return _converse(Conversation(lambda messages: _answer(llm, params, messages), args.system), args)


def _with_server(args: argparse.Namespace, fields: dict[str, Any]) -> int:
    if settings := given_settings(args):
        raise ConfigError(f"{flag(next(iter(settings)))} is the server's to set: it cannot go with --url")
    from headway.cli.chat_server import ServerAnswers

    key = args.api_key or os.environ.get(API_KEY_VARIABLE)
    answers = ServerAnswers(args.url, args.model_name, key, fields)

    def answer(messages: list[Message]) -> str:
        pieces = []
        for text in answers.stream(messages):
            pieces.append(text)
            print(text, end="", flush=True)
        print(flush=True)
        return "".join(pieces)

    return _converse(Conversation(answer, args.system), args)


def _answer(llm: LLM, params: SamplingParams, messages: list[Message]) -> str:
    prompt: Any = "\n".join(message["content"] for message in messages) + "\n"
    if llm.has_chat_template:
        prompt = llm.render_chat(messages)
    return print_stream(llm, prompt, params, is_quiet=not sys.stderr.isatty())


class Conversation:
    """Turns so far; each answer sees all of them. `answer` prints one as it comes and returns its text."""

    def __init__(self, answer: Callable[[list[Message]], str], system: str | None) -> None:
        self._answer = answer
        self._opening = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self) -> None:
        self._messages: list[Message] = list(self._opening)

    def say(self, text: str) -> None:
        """One turn. One that is refused or interrupted is forgotten."""
        turn = {"role": "user", "content": text}
        answer = self._answer([*self._messages, turn])
        self._messages += [turn, {"role": "assistant", "content": answer}]


def _converse(conversation: Conversation, args: argparse.Namespace) -> int:
    if args.quick is not None:
        conversation.say(args.quick)
        return 0
    mark = "> " if sys.stdin.isatty() else ""
    while (line := _read_line(mark)) not in (None, "/exit"):
        if line == "/clear":
            conversation.clear()
        elif line:
            _take_turn(conversation, line)
    return 0


def _read_line(mark: str) -> str | None:
    try:
        return input(mark).strip()
    except EOFError:
        return None


def _take_turn(conversation: Conversation, line: str) -> None:
    """At a terminal Ctrl-C ends the answer, not the conversation."""
    try:
        conversation.say(line)
    except (RequestError, ServerError) as error:
        print(f"headway: error: {error}; /clear starts over", file=sys.stderr)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print()
