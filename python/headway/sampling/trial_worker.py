"""The process of `GrammarTrial`: reads a set-up and then forms, a line of JSON each, and says why one is refused.

An empty reason means that it went well. Each form is compiled in a fork, whose time and memory the kernel bounds.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING, Any

from headway.sampling.grammar import GrammarState, compiled, make_tokenizer, num_mask_words
from headway.sampling.grammar_trial import GrammarError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

WALL_TIMES = 8  # of the processor's time: a machine that is busy with other things is not the grammar's fault


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    tokenizer = make_tokenizer(setup["tokenizer_json"], setup["vocab_size"], setup["eos_token_ids"])
    _answer("")
    for line in sys.stdin:
        _answer(_try(tokenizer, json.loads(line), setup))


def _answer(why: str) -> None:
    print(json.dumps({"why": why}), flush=True)


def _try(tokenizer: LLTokenizer, form: dict[str, Any], setup: dict[str, Any]) -> str:
    reading_end, writing_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading_end)
        _run(tokenizer, form, setup, writing_end)
    os.close(writing_end)
    with open(reading_end, "rb") as pipe:
        why = pipe.read().decode()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        return f"it needs more than {setup['cpu_s']:g} s or {setup['memory_bytes'] >> 20} MiB"
    return why


def _run(tokenizer: LLTokenizer, form: dict[str, Any], setup: dict[str, Any], writing_end: int) -> None:
    """Does not return. Nothing handles these signals: the kernel ends the process."""
    _limit_memory(setup["memory_bytes"])
    signal.setitimer(signal.ITIMER_PROF, setup["cpu_s"])
    signal.setitimer(signal.ITIMER_REAL, WALL_TIMES * setup["cpu_s"])
    why = ""
    try:
        GrammarState(compiled(tokenizer, form), num_mask_words(setup["vocab_size"])).mask()
    except GrammarError as error:
        why = str(error)
    except BaseException:
        os._exit(1)
    os.write(writing_end, why.encode())
    os._exit(0)


def _limit_memory(num_bytes: int) -> None:
    """Beyond what is mapped already."""
    with open("/proc/self/statm") as file:
        mapped_bytes = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + num_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
