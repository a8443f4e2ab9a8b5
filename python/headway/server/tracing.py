"""One OpenTelemetry span for each prompt of a request, under the names of the GenAI conventions.

Spans carry sizes, parameters and times, never text. They are sent in batches by a thread of the exporter's, which drops
what a collector does not take: no request waits for it. Without --otlp-traces-endpoint nothing here is imported.
Names: OpenTelemetry semantic conventions, GenAI spans; `gen_ai.latency.*` as vLLM has them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from headway import __version__
from headway.errors import BuildError
from headway.outputs import RequestMetrics
from headway.server.client import EngineOutput, EngineRequest
from headway.server.errors import failed_output

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

CHAT_PATH = "/v1/chat/completions"
_LATENCIES = {
    "gen_ai.latency.time_in_queue": "queue_s",
    "gen_ai.latency.time_to_first_token": "ttft_s",
    "gen_ai.latency.time_in_model_prefill": "prefill_s",
    "gen_ai.latency.time_in_model_decode": "decode_s",
    "gen_ai.latency.time_in_model_inference": "inference_s",
    "gen_ai.latency.e2e": "latency_s",
}


class Watch(Protocol):
    """Told of every output of a request, and left when it is over."""

    def note(self, prompt_index: int, output: EngineOutput) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NoWatch:
    """Nobody asked for spans."""

    def note(self, prompt_index: int, output: EngineOutput) -> None: ...
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Tracing:
    """Makes spans of one server. Closing it sends what is left."""

    def __init__(self, provider: TracerProvider, model: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("headway", __version__)
        self._model = model

    def watch(
        self, path: str, headers: Mapping[bytes, bytes], requests: Sequence[EngineRequest]
    ) -> RequestSpans:
        """Their parent is the caller's span, where a `traceparent` header names one."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        names = ("traceparent", "tracestate")
        carrier = {
            name: headers[name.encode()].decode("latin-1") for name in names if name.encode() in headers
        }
        parent = TraceContextTextMapPropagator().extract(carrier)
        operation = "chat" if path == CHAT_PATH else "text_completion"
        spans = [
            self._tracer.start_span(
                f"{operation} {self._model}",
                context=parent,
                kind=SpanKind.SERVER,
                attributes={
                    "gen_ai.operation.name": operation,
                    "gen_ai.provider.name": "headway",
                    "gen_ai.request.model": self._model,
                    "gen_ai.response.model": self._model,
                    **_request_attributes(request),
                },
            )
            for request in requests
        ]
        return RequestSpans(spans, requests)

    def close(self) -> None:
        self._provider.shutdown()


class RequestSpans:
    """The spans of one HTTP request, one a prompt. Each ends with its prompt's last completion."""

    def __init__(self, spans: Sequence[Span], requests: Sequence[EngineRequest]) -> None:
        self._spans = spans
        self._num_open = [request.params.n for request in requests]
        self._reasons: list[dict[int, str]] = [{} for _ in requests]

    def note(self, prompt_index: int, output: EngineOutput) -> None:
        if output.finish_reason is None:
            return
        self._reasons[prompt_index][output.index] = output.finish_reason
        if output.finish_reason == "error":
            _set_error(self._spans[prompt_index], str(failed_output(output.stop_reason).shown_code))
        self._num_open[prompt_index] -= 1
        if self._num_open[prompt_index]:
            return
        span, reasons = self._spans[prompt_index], self._reasons[prompt_index]
        span.set_attribute("gen_ai.response.finish_reasons", [reasons[i] for i in sorted(reasons)])
        span.set_attribute("gen_ai.usage.output_tokens", output.usage.num_output_tokens)
        span.set_attribute("gen_ai.usage.cache_read.input_tokens", output.usage.num_cached_tokens)
        if output.metrics is not None:
            span.set_attributes(_latencies(output.metrics))
        span.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is open was given up by its client, or failed."""
        for span, num_open in zip(self._spans, self._num_open, strict=True):
            if num_open:
                _set_error(span, kind.__qualname__ if kind is not None else "unfinished")
                span.end()


def open_tracing(endpoint: str, model: str) -> Tracing:
    """Sends to `endpoint`, a collector's whole URL. Raises BuildError where the extra is not installed."""
    require_packages()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES of the environment go over this.
    named = Resource.create({"service.version": __version__})
    if str(named.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        named = named.merge(Resource({"service.name": "headway"}))
    provider = TracerProvider(resource=named)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider, model)


def require_packages() -> None:
    for name in ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"):
        if not _is_there(name):
            raise BuildError(f"{name} is not installed", hint="pip install 'headway[otel]'")


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _request_attributes(request: EngineRequest) -> dict[str, str | int | float]:
    """What was asked for; what is unset is left out."""
    params = request.params
    asked: dict[str, str | int | float | None] = {
        "gen_ai.response.id": request.request_id,
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
        "gen_ai.request.choice.count": params.n,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _latencies(metrics: RequestMetrics) -> dict[str, float]:
    found = {name: getattr(metrics, attribute) for name, attribute in _LATENCIES.items()}
    return {name: value for name, value in found.items() if value is not None}


def _set_error(span: Span, kind: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)
