"""`headway chat`: a conversation in the terminal. Models without a chat template continue the text instead."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headway.cli.console import open_llm
from headway.cli.flags import add_engine_flags, add_sampling_flags, given_params
from headway.cli.generate import print_stream
from headway.errors import RequestError
from headway.request import SamplingParams

if TYPE_CHECKING:
    from headway.llm import LLM

DEFAULT_MAX_TOKENS = 512


def add_to(commands: Any, *, shows_all: bool) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description="A conversation: one line a turn, /clear forgets it, /exit or end of input leaves.",
    )
    parser.add_argument("--system", help="system message at the start of the conversation")
    parser.add_argument("-q", "--quick", metavar="TEXT", help="ask this one thing and leave")
    parser.add_argument("--verbose", action="store_true", help="log to stderr even when it is no terminal")
    add_sampling_flags(parser, shows_all=shows_all)
    add_engine_flags(parser, shows_all=shows_all)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    changes = {"max_tokens": DEFAULT_MAX_TOKENS, **given_params(args)}
    SamplingParams(**changes)  # refuse bad values before a model is loaded
    with open_llm(args, max_num_seqs=1) as llm:
        params = replace(llm.get_default_sampling_params(), **changes)
        conversation = Conversation(llm, params, args.system)
        if args.quick is not None:
            conversation.say(args.quick)
            return 0
        if not llm.has_chat_template and sys.stderr.isatty():
            print("this model has no chat template: it continues the text", file=sys.stderr)
        return _loop(conversation)


class Conversation:
    """Turns so far; each answer sees all of them."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._opening = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self) -> None:
        self._messages: list[dict[str, str]] = list(self._opening)

    def say(self, text: str) -> None:
        """One turn: prints the answer as it comes. A turn that is refused or interrupted is forgotten."""
        turn = {"role": "user", "content": text}
        prompt = self._prompt([*self._messages, turn])
        answer = print_stream(self._llm, prompt, self._params, is_quiet=not sys.stderr.isatty())
        self._messages += [turn, {"role": "assistant", "content": answer}]

    def _prompt(self, messages: list[dict[str, str]]) -> Any:
        if self._llm.has_chat_template:
            return self._llm.render_chat(messages)
        return "\n".join(message["content"] for message in messages) + "\n"


def _loop(conversation: Conversation) -> int:
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
    except RequestError as error:
        print(f"headway: error: {error}; /clear starts over", file=sys.stderr)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print()
