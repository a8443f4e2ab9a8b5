"""An engine's process as its server sees it: started, greeted, watched, ended. Knows no requests.

The address lies in a directory of mode 0700 under the temporary directory. Directory and socket are gone as soon as the
engine has said hello; what is left is one connection between two processes.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from headway.errors import ConfigError, EngineDeadError, HeadwayError
from headway.remote.faults import from_fault
from headway.remote.link import Link
from headway.remote.messages import (
    MAX_ENGINE_FRAME_BYTES,
    PROTOCOL_VERSION,
    EngineMessage,
    Failed,
    Hello,
    Loading,
    ProtocolError,
    Ready,
    Start,
    engine_messages,
)

logger = logging.getLogger("headway")

# -P: a file of the working directory, such as a checkpoint's folder, is never taken for a module.
COMMAND = (sys.executable, "-P", "-m", "headway.remote")
MAX_FOLDER_CHARS = 70  # a Unix socket's path may have 108, a random name among them
DUMP_S = 0.3  # for a process to write its stacks down
POLL_S = 0.05
LAST_WORDS_S = 1.0  # for what a process has said before its end to be read off its socket
Progress = Callable[[int, int], None]


class EngineProcess:
    """A process from its start to its end. The constructor returns at once, `greet` when the engine takes requests.

    Args:
        options: what the command makes an engine of.
        command: a program that does what `python -m headway.remote` does.

    Raises ConfigError where a socket cannot be made.
    """

    def __init__(
        self, options: dict[str, Any], *, watchdog_timeout_s: float, command: Sequence[str] = COMMAND
    ) -> None:
        self._folder = _private_folder()
        self._address = f"ipc://{self._folder}/engine"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._secret = secrets.token_hex(32)
        try:
            self.link = self._open_door()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=2,  # results alone go to stdout, and an engine has none
                env={**os.environ, "PYTHONPATH": _module_path()},
                start_new_session=True,  # Ctrl-C is the server's to hear
            )
        except BaseException:
            self._context.destroy(linger=0)
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self.pid = self._process.pid
        self._finalizer = weakref.finalize(self, _end, self._process, self._context, self._folder)
        self._tell(options, watchdog_timeout_s)

    def greet(self, progress: Progress | None = None) -> Ready:
        """Waits until the engine takes requests. Raises what kept it from that, in the engine's own words."""
        try:
            while True:
                for message in self._next_messages():
                    if isinstance(message, Ready):
                        return message
                    if isinstance(message, Failed):
                        raise from_fault(message.fault)
                    if isinstance(message, Loading) and progress is not None:
                        progress(message.num_done_bytes, message.num_total_bytes)
        except BaseException:
            self.end()
            raise

    def why_ended(self) -> str:
        """How the process ended; empty while it runs."""
        code = self._process.poll()
        if code is None:
            return ""
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", as when memory runs out" if name == "SIGKILL" else ""
            return f"the engine's process was ended by {name}{hint}"
        return f"the engine's process ended with exit code {code}"

    def dump_stacks(self) -> None:
        """Asks for the stacks of all its threads on stderr. A process that is stopped writes nothing."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(DUMP_S)

    def kill(self) -> None:
        """Ends the process without waiting for its end, which may take a while to free a device. Legal twice."""
        self.link.close()
        self._process.kill()

    def end(self) -> None:
        """`kill`, and returns when nothing is left of it. Legal twice; happens by itself when Python ends."""
        self.link.close()
        self._finalizer()

    def _open_door(self) -> Link:
        try:
            link = Link.bound(self._context, self._address, MAX_ENGINE_FRAME_BYTES)
            (self._folder / "engine").chmod(0o600)
            return link
        except (zmq.ZMQError, OSError) as error:
            raise ConfigError(f"no socket for the engine's process can be made: {error}") from error

    def _tell(self, options: dict[str, Any], watchdog_timeout_s: float) -> None:
        start = Start(
            version=PROTOCOL_VERSION,
            address=self._address,
            secret=self._secret,
            parent_pid=os.getpid(),
            dies_with_parent=threading.current_thread() is threading.main_thread(),
            watchdog_timeout_s=watchdog_timeout_s,
            log_level=logger.getEffectiveLevel(),
            options=options,
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already: `greet` says how
            self._process.stdin.write(msgspec.json.encode(start) + b"\n")
            self._process.stdin.flush()

    def _next_messages(self) -> list[EngineMessage]:
        """Of the engine alone; frames of anybody else are counted and dropped."""
        while not self.link.wait(POLL_S):
            if (reason := self.why_ended()) and not self.link.wait(LAST_WORDS_S):
                raise HeadwayError(f"{reason} before it was ready", hint="its own messages are above")
        found = self.link.receive()
        if found is None:
            return []
        sender, frame = found
        try:
            messages = engine_messages(frame)
        except ProtocolError:
            messages = []
        if self.link.peer is not None:
            return messages
        for message in messages[:1]:
            if isinstance(message, Hello) and hmac.compare_digest(message.secret, self._secret):
                self._welcome(sender, message.version)
                return messages[1:]
        self.link.num_strangers += 1
        return []

    def _welcome(self, sender: bytes, version: int) -> None:
        if version != PROTOCOL_VERSION:
            raise EngineDeadError(
                f"the engine's process speaks version {version}, the server version {PROTOCOL_VERSION}",
                hint="both must be of one installation",
            )
        self.link.peer = sender
        # The socket's name goes and its connection stays: from now on there is no way in. (ZeroMQ's own unbind would
        # close the connection too.)
        shutil.rmtree(self._folder, ignore_errors=True)


def _private_folder() -> Path:
    """Of mode 0700. A temporary directory with too long a name for a socket is passed over."""
    is_short = len(tempfile.gettempdir()) <= MAX_FOLDER_CHARS
    try:
        return Path(tempfile.mkdtemp(prefix="headway-", dir=None if is_short else "/tmp"))
    except OSError as error:
        raise ConfigError(
            f"no socket for the engine's process can be made: {error}", hint="TMPDIR"
        ) from error


def _module_path() -> str:
    """The engine imports the very package that runs here, wherever it was found."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.pathsep.join(dict.fromkeys([root, *paths]))


def _end(process: subprocess.Popen[bytes], context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    context.destroy(linger=0)
    shutil.rmtree(folder, ignore_errors=True)
