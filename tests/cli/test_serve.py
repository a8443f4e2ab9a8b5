"""`headway serve` as a user types it: a process that says where it listens, answers, and ends with the right code."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

if importlib.util.find_spec("starlette") is None:
    pytest.skip("the extra `serve` is not installed", allow_module_level=True)

SMALL = ("--device", "cpu", "--max-model-len", "256", "--max-num-seqs", "4", "--port", "0")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@contextmanager
def serving(*flags: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process and its port, once it is ready."""
    command = [sys.executable, "-m", "headway", "serve", *SMALL, *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.fullmatch(r"serving .* at http://127\.0\.0\.1:(\d+)\n", line):
                yield process, int(found[1])
                break
        else:
            raise AssertionError("it ended without serving")
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def refused(*flags: str) -> str:
    """The one line of a server that does not start, with code 2."""
    command = [sys.executable, "-m", "headway", "serve", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("sig", "flags"), [(signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGTERM, ("--engine-in-process",))]
)
def test_it_answers_until_it_is_told_to_stop(sig: int, flags: tuple[str, ...]) -> None:
    names = ("--api-key", "sk-x", "--served-model-name", "a", "--served-model-name", "b")
    with serving(*names, *flags) as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/v1/models", headers={"authorization": "Bearer sk-x"})
        assert [model["id"] for model in json.loads(connection.getresponse().read())["data"]] == ["a", "b"]
        body = json.dumps({"prompt": "def f", "max_tokens": 100, "ignore_eos": True, "stream": True})
        headers = {"authorization": "Bearer sk-x", "content-type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        reply = connection.getresponse()
        assert reply.read(10)
        process.send_signal(sig)
        assert reply.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        assert process.wait(timeout=30) == 0


def test_what_cannot_be_served_is_refused_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in refused("--port", str(port))
    assert "port" in refused("--port", "70000")
    assert "two models" in refused("one", "--model", "another")
    assert "--api-key-file" in refused("--api-key-file", "/none", "--port", "0")
    assert "did you mean --max-num-queued-reqs" in refused("--max-num-queued-req", "5")


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (("/nonexistent",), 4, "/nonexistent"),
        (("--device", "cpu", "--dtype", "float16"), 2, "float16"),
        (("--device", "cpu", "--kv-cache-memory-bytes", "1KiB"), 3, "kv_cache_memory_bytes"),
    ],
)
def test_what_keeps_the_engine_from_starting_is_said_once(
    flags: tuple[str, ...], code: int, text: str
) -> None:
    """It happens in another process, and looks as if it had not."""
    command = [sys.executable, "-m", "headway", "serve", "--port", "0", "--quiet", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("headway: error: ")
    assert done.stderr.count("\n") == 1
    assert text in done.stderr


def test_its_help_lists_its_flags_and_imports_no_framework() -> None:
    script = "import sys\nfrom headway.cli import main\ntry:\n    main(['serve', '--help-all'])\n"
    script += "except SystemExit:\n    pass\n"
    script += "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert "--max-num-queued-tokens" in done.stdout
    assert not {"torch", "starlette", "uvicorn", "msgspec", "zmq"} & set(done.stderr.split())
