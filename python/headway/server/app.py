"""The ASGI application of one engine: routes of `endpoints`, behind `Edge` and `KeyCheck`."""

from __future__ import annotations

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from headway.server.calls import EndpointApp
from headway.server.edge import Edge, KeyCheck
from headway.server.endpoints import Endpoint, offered
from headway.server.errors import ApiError, from_exception
from headway.server.openapi import openapi_document
from headway.server.state import ServerState


def build_app(state: ServerState) -> Edge:
    endpoints = offered(state.settings)
    origins = list(state.settings.allowed_origins or ())
    app = Starlette(
        routes=[_route(state, endpoint) for endpoint in endpoints],
        exception_handlers={HTTPException: _http_error, Exception: _unexpected},
    )
    app.router.redirect_slashes = False  # /v1/models/ is another path, and one that needs a key
    app.state.openapi = msgspec.json.encode(openapi_document(endpoints))
    checked = KeyCheck(app, state, frozenset(endpoint.path for endpoint in endpoints if endpoint.is_open))
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
    app = EndpointApp(state, endpoint.handler, endpoint.body_kind, is_generation=endpoint.chunk is not None)
    return Route(endpoint.path, app, methods=list(endpoint.methods))


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
