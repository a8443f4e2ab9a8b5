"""The OpenAPI document, made of the endpoints' records and of the structs that requests are checked against."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from headway import __version__
from headway.server.endpoints import Endpoint
from headway.server.errors import ErrorResponse

_ERROR_WORDS = {
    400: "A value is wrong",
    401: "The API key is missing or wrong",
    403: "The Host header is not answered",
    404: "There is no such path or model",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "This key has too many requests open",
    500: "A fault of the server",
    503: "Too much waits, or the server is going down",
}
_EVERYWHERE = (401, 403)


def openapi_document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    kinds: dict[type[msgspec.Struct], None] = {ErrorResponse: None}
    for endpoint in endpoints:
        kinds |= dict.fromkeys(k for k in (*endpoint.requests, endpoint.response, endpoint.chunk) if k)
    _, components = msgspec.json.schema_components(list(kinds), ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        operations = paths.setdefault(re.sub(r":path", "", endpoint.path), {})
        for method in endpoint.methods:
            operations[method.lower()] = _operation(endpoint, method)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Headway", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(endpoint: Endpoint, method: str) -> dict[str, Any]:
    name = re.sub(r"\W+", "_", endpoint.path.partition("{")[0]).strip("_") or "page"
    one = "_one" if "{" in endpoint.path else ""
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}_{name}{one}",
        "summary": endpoint.summary,
        "responses": _responses(endpoint),
    }
    if endpoint.requests:
        schemas = [_ref(kind) for kind in endpoint.requests]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{" in endpoint.path:
        operation["parameters"] = [
            {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    return operation


def _responses(endpoint: Endpoint) -> dict[str, Any]:
    is_text = endpoint.media_type != "application/json"
    schema = _ref(endpoint.response) if endpoint.response else {"type": "string" if is_text else "object"}
    content: dict[str, Any] = {endpoint.media_type: {"schema": schema}}
    if endpoint.chunk is not None:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    responses: dict[str, Any] = {"200": {"description": endpoint.summary, "content": content}}
    for status in sorted({*_EVERYWHERE, *endpoint.errors}):
        responses[str(status)] = {
            "description": _ERROR_WORDS[status],
            "content": {"application/json": {"schema": _error_schema(endpoint, status)}},
        }
    return responses


def _error_schema(endpoint: Endpoint, status: int) -> dict[str, Any]:
    """A health check that fails answers with its own record."""
    is_health = endpoint.is_open and status == 503 and endpoint.response is not None
    return _ref(endpoint.response) if is_health and endpoint.response else _ref(ErrorResponse)


def _ref(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
