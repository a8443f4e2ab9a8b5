"""response_format and structured_outputs -> the one parameter that the engine reads."""

from __future__ import annotations

from typing import Any

import msgspec

from headway.server.errors import bad_request
from headway.server.schemas.common import ResponseFormat, SamplingFields, StructuredOutputs


def structured_outputs(fields: SamplingFields, tools_schema: dict[str, Any] | None = None) -> dict[str, Any]:
    """{"structured_outputs": {...}}, or nothing where the answer is free. Raises ApiError for more than one of them.

    tools_schema: of an answer that must be a tool call.
    """
    wanted = [
        form for form in (_from_format(fields.response_format), _given(fields.structured_outputs)) if form
    ]
    if tools_schema is not None:
        wanted.append({"json": tools_schema})
    if len(wanted) > 1:
        raise bad_request(
            "response_format",
            "only one of response_format, structured_outputs and a forced tool call is possible",
        )
    return {"structured_outputs": wanted[0]} if wanted else {}


def _from_format(asked: ResponseFormat | None) -> dict[str, Any] | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return {"json_object": True}
    schema = (asked.json_schema or {}).get("schema")
    if not isinstance(schema, dict):
        raise bad_request("response_format.json_schema", "json_schema must hold a schema, which is an object")
    return {"json": schema}


def _given(asked: StructuredOutputs | None) -> dict[str, Any] | None:
    if asked is None:
        return None
    given = {name: value for name, value in msgspec.structs.asdict(asked).items() if value is not None}
    if len(given) != 1:
        names = ", ".join(msgspec.structs.fields(StructuredOutputs)[i].name for i in range(5))
        raise bad_request("structured_outputs", f"structured_outputs takes exactly one of {names}")
    return given
