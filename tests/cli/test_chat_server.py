"""`headway chat --url`: turns of a conversation against a running server, and what goes wrong with one."""

from __future__ import annotations

import importlib.util
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

if importlib.util.find_spec("starlette") is None:
    pytest.skip("the extra `serve` is not installed", allow_module_level=True)

from headway.cli.main import main
from headway.server.client import EngineRequest
from tests.server.fake_engine import FakeEngine
from tests.server.live import Live, live, wait_until

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}"


def repeat(request: EngineRequest) -> list[str]:
    """Says the prompt, a letter at a time."""
    return list(f"<{request.prompt}>")


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(FakeEngine(repeat, template=TEMPLATE), api_key=["right"]) as found:
        yield found


def test_turns_are_remembered_and_forgotten(
    server: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\n/clear\nthree\n/exit\nnever\n"))
    assert main(["chat", "--url", f"{server.url}/v1", "--system", "be brief"]) == 0
    first, second = "<s:be brief|u:one|>", "<s:be brief|u:one|a:<s:be brief|u:one|>|u:two|>"
    assert capsys.readouterr().out.splitlines() == [first, second, "<s:be brief|u:three|>"]


def test_what_is_set_is_asked_for(server: Live, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--temperature", "0.5", "--max-tokens", "7", "--stop", "z", "--model-name", "fake"]
    assert main(["chat", "--url", server.url, "--api-key", "right", "-q", "hi", *words]) == 0
    assert capsys.readouterr().out == "<u:hi|>\n"
    engine = server.client
    assert isinstance(engine, FakeEngine)
    params = engine.seen[-1].params
    assert (params.temperature, params.max_tokens, list(params.stop or ())) == (0.5, 7, ["z"])


def test_a_refusal_is_one_line_and_a_conversation_outlives_it(
    server: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--url", server.url, "--api-key", "wrong", "-q", "hi"]) == 1
    assert "the server answers 401: the API key is missing or wrong" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 100_000 + "\nshort\n"))
    assert main(["chat", "--url", server.url, "--api-key", "right"]) == 0
    shown = capsys.readouterr()
    assert "the server answers 400: " in shown.err
    assert shown.out == "<u:short|>\n"


def test_nobody_there_and_nobody_who_speaks_it(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert main(["chat", "--url", f"http://127.0.0.1:{unused.getsockname()[1]}", "-q", "hi"]) == 1
    assert "no answer from http://127.0.0.1" in capsys.readouterr().err
    for reply in (b"[]", b'{"data": [{}]}', b"<html>"):
        with answering(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + reply) as port:
            assert main(["chat", "--url", f"http://127.0.0.1:{port}", "-q", "hi"]) == 1
        assert "is not OpenAI's protocol" in capsys.readouterr().err


@contextmanager
def answering(reply: bytes) -> Iterator[int]:
    """A port where the next caller gets `reply`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            caller, _ = listener.accept()
            with caller:
                caller.recv(65536)
                caller.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def test_a_fault_in_the_stream_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(repeat, template=TEMPLATE)
    engine.num_steps_before_fault = 2
    with live(engine) as server:
        assert main(["chat", "--url", server.url, "-q", "hi"]) == 1
        wait_until(lambda: not engine.live)
    shown = capsys.readouterr()
    assert shown.out == "<u"
    assert "the engine has stopped" in shown.err
