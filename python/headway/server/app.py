"""The ASGI application of one engine: routes of `endpoints`, behind `Edge` and `KeyCheck`."""

from __future__ import annotations

from collections.abc import Awaitable

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headway.server.calls import EndpointApp, Receive, Scope, Send
from headway.server.edge import Edge, KeyCheck
from headway.server.endpoints import Endpoint, offered
from headway.server.errors import ApiError, from_exception
from headway.server.openapi import openapi_document
from headway.server.schemas.admin import HealthResponse
from headway.server.state import ServerState


class Shortcut:
    """What runs the model goes straight to its endpoint: each layer of Starlette's would cost every event of a stream.
    So do probes, which are to be answered quickly however much runs.

    All else, other methods and spellings among it, goes to `app`.
    """

    def __init__(self, app: Starlette, endpoints: dict[tuple[str, str], EndpointApp]) -> None:
        self._app = app
        self._endpoints = endpoints

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        endpoint = self._endpoints.get((scope.get("method", ""), scope.get("path", "")), self._app)
        return endpoint(scope, receive, send)


def build_app(state: ServerState) -> Edge:
    endpoints = offered(state.settings)
    origins = list(state.settings.allowed_origins or ())
    app = Starlette(
        routes=[_route(state, endpoint) for endpoint in endpoints],
        exception_handlers={HTTPException: _http_error, Exception: _unexpected},
    )
    app.router.redirect_slashes = False  # /v1/models/ is another path, and one that needs a key
    app.state.openapi = msgspec.json.encode(openapi_document(endpoints))
    direct = {
        (method, endpoint.path): _endpoint_app(state, endpoint)
        for endpoint in endpoints
        if endpoint.chunk or endpoint.response is HealthResponse
        for method in endpoint.methods
    }
    open_paths = frozenset(endpoint.path for endpoint in endpoints if endpoint.is_open)
    checked = KeyCheck(Shortcut(app, direct), state, open_paths)
    return Edge(_for_browsers(checked, origins) if origins else checked, state)


def _for_browsers(app: KeyCheck, origins: list[str]) -> CORSMiddleware:
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )


def _route(state: ServerState, endpoint: Endpoint) -> Route:
    return Route(endpoint.path, _endpoint_app(state, endpoint), methods=list(endpoint.methods))


def _endpoint_app(state: ServerState, endpoint: Endpoint) -> EndpointApp:
    is_generation = endpoint.chunk is not None
    return EndpointApp(state, endpoint.handler, endpoint.body_kind, is_generation=is_generation)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router itself answers: 404 and 405."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        return _response(
            ApiError("method_not_allowed", "the path does not take this method", headers=headers)
        )
    return _response(ApiError("not_found", "there is no such path", headers=headers))


async def _unexpected(request: Request, error: Exception) -> Response:
    return _response(from_exception(error))


def _response(error: ApiError) -> Response:
    return Response(error.body(), error.status, dict(error.headers), media_type="application/json")
