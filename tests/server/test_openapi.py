"""The OpenAPI document: every operation, asked what it allows and what it does not, answers as the document says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from headway.server.endpoints import ENDPOINTS
from headway.server.openapi import openapi_document
from tests.server.live import Live

DOCUMENT = openapi_document(ENDPOINTS)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]


def ask_all(server: Live, document: Any, path: str, method: str, num_examples: int) -> int:
    """Runs examples of both kinds, right and wrong; returns how many."""
    operation = schemathesis.openapi.from_dict(document)[path][method.upper()]
    num_asked = 0
    description = document["paths"][path][method]
    wrong = [GenerationMode.NEGATIVE] if "requestBody" in description else []  # nothing else can be wrong
    for mode in (GenerationMode.POSITIVE, *wrong):

        @settings(
            max_examples=num_examples,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
            database=None,
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            nonlocal num_asked
            num_asked += 1
            case.call_and_validate(base_url=server.url, checks=CHECKS)

        check()
    return num_asked


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=lambda word: str(word).strip("/"))
@pytest.mark.parametrize("num_examples", [8, pytest.param(100, marks=pytest.mark.long)])
def test_an_operation_keeps_to_the_document(
    fake_server: Live, path: str, method: str, num_examples: int
) -> None:
    assert ask_all(fake_server, DOCUMENT, path, method, num_examples) >= 1


def test_a_document_that_is_wrong_would_be_seen(fake_server: Live) -> None:
    wrong = json.loads(json.dumps(DOCUMENT))
    wrong["components"]["schemas"]["VersionResponse"]["properties"]["version"]["type"] = "integer"
    with pytest.raises((FailureGroup, AssertionError, BaseExceptionGroup)):
        ask_all(fake_server, wrong, "/version", "get", 2)


def test_the_document_is_served_and_names_every_endpoint(fake_server: Live) -> None:
    found = fake_server.get("/openapi.json").json
    assert found == json.loads(json.dumps(DOCUMENT))
    assert sorted(found["paths"]) == sorted(e.path.replace(":path", "") for e in ENDPOINTS)
    ids = [operation["operationId"] for methods in found["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))
