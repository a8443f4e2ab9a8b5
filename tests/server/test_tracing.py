"""Spans: one a prompt, under the conventions' names, child of the caller's, ended whatever becomes of the request."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from headway.aio import AsyncLLM
from headway.errors import BuildError, ConfigError
from headway.server import tracing
from headway.server.settings import ServerSettings
from headway.server.tracing import Tracing
from tests.server.fake_engine import FakeEngine
from tests.server.live import Live, live, wait_until
from tests.server.test_lifecycle import posted

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def traced(server: Live) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server.state.tracing = Tracing(provider, server.state.names[0])
    return exporter


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[Live]:
    llm = AsyncLLM(tiny_model_dir, device="cpu", max_num_seqs=4, max_model_len=512)
    with live(llm, served_model_name=["tiny"]) as found:
        yield found


def spans_of(exporter: InMemorySpanExporter, count: int) -> tuple[ReadableSpan, ...]:
    wait_until(lambda: len(exporter.get_finished_spans()) >= count)
    spans = exporter.get_finished_spans()
    assert len(spans) == count
    return spans


def test_a_completion_is_a_span_under_the_callers(server: Live) -> None:
    exporter = traced(server)
    body = {"prompt": "def f(x):", "max_tokens": 5, "ignore_eos": True, "temperature": 0.5, "seed": 3}
    reply = server.post("/v1/completions", body, traceparent=PARENT).json
    (span,) = spans_of(exporter, 1)
    assert (span.name, span.kind) == ("text_completion tiny", SpanKind.SERVER)
    assert span.status.status_code == StatusCode.UNSET
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}-{span.parent.span_id:016x}" in PARENT
    found = dict(span.attributes or {})
    assert found["gen_ai.operation.name"] == "text_completion"
    assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "tiny"
    assert found["gen_ai.usage.input_tokens"] == reply["usage"]["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == found["gen_ai.request.max_tokens"] == 5
    assert (found["gen_ai.request.temperature"], found["gen_ai.request.seed"]) == (0.5, 3)
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    assert str(found["gen_ai.response.id"]).startswith(reply["id"])
    latencies = {name: value for name, value in found.items() if name.startswith("gen_ai.latency.")}
    assert set(latencies) == set(tracing._LATENCIES)
    queue, first, whole = (
        latencies[f"gen_ai.latency.{n}"] for n in ("time_in_queue", "time_to_first_token", "e2e")
    )
    assert 0 <= queue < first < whole
    assert "def f" not in repr(found)


def test_each_prompt_has_a_span_and_all_its_completions(server: Live) -> None:
    exporter = traced(server)
    body = {"prompt": ["a = ", "b = 1"], "n": 2, "max_tokens": 3, "ignore_eos": True, "temperature": 1.0}
    for is_stream in (False, True):
        assert server.post("/v1/completions", {**body, "stream": is_stream}).status == 200
    for span in spans_of(exporter, 4):
        assert span.parent is None
        attributes = dict(span.attributes or {})
        assert attributes["gen_ai.response.finish_reasons"] == ("length", "length")
        assert attributes["gen_ai.usage.output_tokens"] == 6
        assert attributes["gen_ai.request.choice.count"] == 2


def test_a_chat_is_named_so_and_a_wrong_parent_is_none() -> None:
    with live(FakeEngine()) as server:
        exporter = traced(server)
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        assert server.post("/v1/chat/completions", body, traceparent="nonsense").status == 200
        (span,) = spans_of(exporter, 1)
        assert (span.name, span.parent) == ("chat fake", None)


def test_spans_of_what_fails_or_is_given_up_end_with_an_error() -> None:
    engine = FakeEngine(step_s=0.005)
    with live(engine) as server:
        exporter = traced(server)
        with server.connect() as sock:
            sock.sendall(posted({"prompt": "x", "max_tokens": 2000, "stream": True}))
            assert sock.recv(100)
        (left,) = spans_of(exporter, 1)
        engine.num_steps_before_fault = 2
        assert server.post("/v1/completions", {"prompt": "z", "max_tokens": 4}).status == 503
        _, failed = spans_of(exporter, 2)
        kinds = [(span.attributes or {})["error.type"] for span in (left, failed)]
        assert kinds[0] in ("CancelledError", "GeneratorExit")
        assert kinds[1] == "EngineDeadError"
        assert all(span.status.status_code == StatusCode.ERROR for span in (left, failed))


def test_a_collector_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-headway")
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        with live(FakeEngine(), otlp_traces_endpoint=endpoint) as server:
            assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status == 200
        collector.shutdown()
    ((path, body),) = got
    assert path == "/v1/traces"
    text = gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body
    for word in (b"text_completion fake", b"my-headway", b"gen_ai.usage.output_tokens"):
        assert word in text


def test_what_cannot_be_traced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--otlp-traces-endpoint"):
        ServerSettings(otlp_traces_endpoint="localhost:4317")
    monkeypatch.setattr(tracing, "_is_there", lambda name: False)
    with pytest.raises(BuildError, match=r"headway\[otel\]"):
        tracing.open_tracing("http://localhost:4318/v1/traces", "tiny")


def test_without_an_endpoint_nothing_is_imported() -> None:
    script = (
        "import sys, headway.server.serve\nprint([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
