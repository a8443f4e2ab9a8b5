"""Every endpoint, once: routes, the OpenAPI document and the table in docs/serving.md are made of these records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from headway.server import admin, chat, completions, live, tokens
from headway.server.calls import Handler
from headway.server.schemas.admin import (
    HealthResponse,
    LoadResponse,
    ModelCard,
    ModelList,
    ProfileResponse,
    ResetResponse,
    ServerInfo,
    VersionResponse,
)
from headway.server.schemas.chat import ChatChunk, ChatRequest, ChatResponse
from headway.server.schemas.completions import CompletionRequest, CompletionResponse
from headway.server.schemas.live import LiveResponse
from headway.server.schemas.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChatRequest,
    TokenizeResponse,
    TokenizerInfo,
    TokenizeTextRequest,
)
from headway.server.settings import ServerSettings

Kind = type[msgspec.Struct]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path and what it does.

    Attributes:
        requests: bodies it takes, one of them; empty: none.
        response: None where it is a document of another kind.
        chunk: one event of its stream; such endpoints run the model and end when their client goes.
        media_type: of what it answers, where all is well.
        is_open: answered without an API key.
        is_dev: only with --enable-dev-endpoints.
        errors: statuses beside those that every endpoint may answer.
    """

    path: str
    methods: tuple[str, ...]
    handler: Handler
    summary: str
    response: Kind | None = None
    requests: tuple[Kind, ...] = ()
    chunk: Kind | None = None
    media_type: str = "application/json"
    is_open: bool = False
    is_dev: bool = False
    errors: tuple[int, ...] = ()

    @property
    def body_kind(self) -> Kind | Callable[[bytes], Kind] | None:
        if len(self.requests) > 1:
            return tokens.tokenize_kind
        return self.requests[0] if self.requests else None


_POST_ERRORS = (400, 404, 408, 413, 415)
_RUN_ERRORS = (*_POST_ERRORS, 429, 500, 503)

ENDPOINTS = (
    Endpoint(
        "/v1/completions",
        ("POST",),
        completions.completions,
        "Continue prompts: text or token ids, one or many",
        CompletionResponse,
        (CompletionRequest,),
        chunk=CompletionResponse,
        errors=_RUN_ERRORS,
    ),
    Endpoint(
        "/v1/chat/completions",
        ("POST",),
        chat.chat_completions,
        "Answer a conversation, with tools and reasoning",
        ChatResponse,
        (ChatRequest,),
        chunk=ChatChunk,
        errors=_RUN_ERRORS,
    ),
    Endpoint("/v1/models", ("GET",), admin.list_models, "The names this server's model goes by", ModelList),
    Endpoint(
        "/v1/models/{model_id:path}",
        ("GET",),
        admin.get_model,
        "One of them",
        ModelCard,
        errors=(404,),
    ),
    Endpoint(
        "/tokenize",
        ("POST",),
        tokens.tokenize,
        "Text or a conversation to token ids",
        TokenizeResponse,
        (TokenizeTextRequest, TokenizeChatRequest),
        errors=_POST_ERRORS,
    ),
    Endpoint(
        "/detokenize",
        ("POST",),
        tokens.detokenize,
        "Token ids to text",
        DetokenizeResponse,
        (DetokenizeRequest,),
        errors=_POST_ERRORS,
    ),
    Endpoint(
        "/tokenizer_info",
        ("GET",),
        tokens.tokenizer_info,
        "Special tokens, chat template and sizes",
        TokenizerInfo,
        errors=(400,),
    ),
    Endpoint(
        "/health",
        ("GET",),
        admin.health,
        "200 while the engine lives and moves, else 503",
        HealthResponse,
        is_open=True,
        errors=(503,),
    ),
    Endpoint(
        "/ready",
        ("GET",),
        admin.ready,
        "200 while requests are taken, else 503",
        HealthResponse,
        is_open=True,
        errors=(503,),
    ),
    Endpoint(
        "/ping",
        ("GET", "POST"),
        admin.health,
        "/health, as SageMaker asks for it",
        HealthResponse,
        is_open=True,
        errors=(503,),
    ),
    Endpoint("/version", ("GET",), admin.version, "Headway's version", VersionResponse),
    Endpoint("/load", ("GET",), admin.load, "What runs, waits and is free: for routers", LoadResponse),
    Endpoint(
        "/metrics", ("GET",), live.metrics, "Counters for Prometheus: metrics.md", media_type="text/plain"
    ),
    Endpoint(
        "/live", ("GET",), live.live, "What the page at / shows: totals and the last steps", LiveResponse
    ),
    Endpoint(
        "/", ("GET",), live.page, "A page that shows the live engine", media_type="text/html", is_open=True
    ),
    Endpoint("/server_info", ("GET",), admin.server_info, "The model and every setting but keys", ServerInfo),
    Endpoint("/openapi.json", ("GET",), admin.openapi, "This interface as an OpenAPI document"),
    Endpoint(
        "/reset_prefix_cache",
        ("POST",),
        admin.reset_prefix_cache,
        "Forget cached prefixes",
        ResetResponse,
        is_dev=True,
    ),
    Endpoint(
        "/start_profile",
        ("POST",),
        admin.start_profile,
        "Record the times of every step",
        ProfileResponse,
        is_dev=True,
        errors=(400,),
    ),
    Endpoint(
        "/stop_profile",
        ("POST",),
        admin.stop_profile,
        "End the record and return it for ui.perfetto.dev",
        is_dev=True,
        errors=(400,),
    ),
)


def offered(settings: ServerSettings) -> tuple[Endpoint, ...]:
    return tuple(e for e in ENDPOINTS if settings.enable_dev_endpoints or not e.is_dev)
