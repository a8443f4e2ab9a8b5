"""Compiles a stranger's grammar where that can be ended: in a process of its own, with limits on time and memory.

A worker holds the tokenizer and forks a child for each grammar. The kernel ends a child that needs too much, and a
child that crashes takes nobody with it. Only whether it went well comes back.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from headway.errors import OverloadedError

START_S = 60.0  # for a worker to read a large vocabulary
ANSWER_S = 20.0  # a child ends long before; a worker that does not answer is replaced


class GrammarError(Exception):
    """The grammar cannot be compiled or cannot go on: a limit was reached, or a token came that it does not allow."""


class GrammarTrial:
    """One worker, started with the first grammar. Thread-safe; one grammar at a time.

    Args:
        tokenizer_json, vocab_size, eos_token_ids: see `GrammarCompiler`.
        cpu_s: of the process's time a grammar may take.
        memory_bytes: that it may take beyond what the worker has.
    """

    def __init__(
        self,
        tokenizer_json: str,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        *,
        cpu_s: float = 1.0,
        memory_bytes: int = 512 << 20,
    ) -> None:
        self._setup = {
            "tokenizer_json": tokenizer_json,
            "vocab_size": vocab_size,
            "eos_token_ids": list(eos_token_ids),
            "cpu_s": cpu_s,
            "memory_bytes": memory_bytes,
        }
        self._worker: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def check(self, form_json: str) -> None:
        """Raises GrammarError for a form that cannot be compiled within the limits, OverloadedError where nothing can
        be compiled now.
        """
        with self._lock:
            try:
                why = self._try(form_json)
            except (OSError, ValueError):  # somebody has ended the worker, and another can be had
                self._end()
                why = self._try_last(form_json)
        if why:
            raise GrammarError(why)

    def close(self) -> None:
        """Legal twice; a later check starts anew."""
        with self._lock:
            self._end()

    def _try(self, form_json: str) -> str:
        if self._worker is None:
            self._worker = _start()
            self._ask(json.dumps(self._setup), START_S)
        return self._ask(form_json, ANSWER_S)

    def _try_last(self, form_json: str) -> str:
        try:
            return self._try(form_json)
        except (OSError, ValueError) as error:
            self._end()
            raise OverloadedError("the process that compiles grammars fails", retry_after_s=5.0) from error

    def _ask(self, line: str, timeout_s: float) -> str:
        """One line there, one line back. Raises OSError or ValueError where none comes."""
        worker = self._worker
        assert worker is not None
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(line.encode() + b"\n")
        worker.stdin.flush()
        if not select.select([worker.stdout], [], [], timeout_s)[0]:
            raise TimeoutError("no answer")
        return str(json.loads(worker.stdout.readline())["why"])

    def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def _start() -> subprocess.Popen[bytes]:
    """It ends when its stdin does. What a hostile grammar makes a library say is not for the log."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "headway.sampling.trial_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([root, *paths]))},
        start_new_session=True,  # Ctrl-C is its owner's to hear
    )
