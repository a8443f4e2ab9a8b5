"""Bytes of a body -> a checked record, or an error that names the field. Knows no endpoint."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, TypeVar

import msgspec

from headway.fields import nearest
from headway.server.errors import ApiError, bad_request, shown

T = TypeVar("T", bound=msgspec.Struct)

MAX_DEPTH = 64
MAX_NODES = 200_000  # of the free-form parts of a body: tools, schemas, template arguments

# Fields that other servers take and that would change the answer: what to use instead.
REFUSED_FIELDS = {
    "guided_json": "use response_format or structured_outputs",
    "guided_regex": "use structured_outputs",
    "guided_choice": "use structured_outputs",
    "guided_grammar": "use structured_outputs",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "logits_processors": "there are none",
    "use_beam_search": "there is no beam search",
    "length_penalty": "there is no beam search",
    "early_stopping": "there is no beam search",
    "chat_template": "the server's is used; see --chat-template",
    "prompt_embeds": "pass token ids",
    "modalities": "only text is served",
    "audio": "only text is served",
}
# What they may be all the same: it asks for what is done anyway.
IDLE_VALUES = {"use_beam_search": False, "length_penalty": 1, "early_stopping": False, "modalities": ["text"]}


@cache
def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(kind)


def decode_body(kind: type[T], body: bytes) -> T:
    """Raises ApiError: malformed JSON, a wrong type, an unknown field, too deep."""
    try:
        record = _decode(kind, body)
    except msgspec.ValidationError as error:
        raise _field_error(kind, str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(None, f"the body is not JSON: {_plain(str(error))}", "invalid_json") from error
    except RecursionError as error:
        raise _too_deep(None) from error
    # Brackets of containers stand in a body as they are: with no more of them nothing is deeper.
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        for name in kind.__struct_fields__:
            value = getattr(record, name)
            if isinstance(value, (dict, list)):
                check_depth(name, value)
    return record


def _decode(kind: type[T], body: bytes) -> T:
    """Fields it does not know may be null or idle: many clients send every field that they know."""
    decoder: msgspec.json.Decoder[T] = _decoder(kind)
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        if "unknown field" not in str(error):
            raise
    fields = msgspec.json.decode(body)
    known = {
        name: value
        for name, value in fields.items()
        if name in kind.__struct_fields__ or not _is_idle(name, value)
    }
    return decoder.decode(msgspec.json.encode(known))


def _is_idle(name: str, value: Any) -> bool:
    return value is None or (name in IDLE_VALUES and IDLE_VALUES[name] == value)


def check_depth(name: str, value: Any) -> None:
    """Raises ApiError where containers are nested deeper than MAX_DEPTH or are more than MAX_NODES."""
    level = [value]
    num_nodes = 0
    for _ in range(MAX_DEPTH + 1):
        level = [child for parent in level for child in _containers(parent)]
        num_nodes += len(level)
        if num_nodes > MAX_NODES:
            raise bad_request(name, f"{name} holds more than {MAX_NODES} lists and objects")
        if not level:
            return
    raise _too_deep(name)


def _containers(parent: Any) -> list[Any]:
    children = parent.values() if isinstance(parent, dict) else parent if isinstance(parent, list) else ()
    return [child for child in children if isinstance(child, (dict, list))]


def _too_deep(name: str | None) -> ApiError:
    return bad_request(name, f"{name or 'the body'} is nested deeper than {MAX_DEPTH} levels")


def _field_error(kind: type[msgspec.Struct], message: str) -> ApiError:
    """msgspec says "Expected `int`, got `str` - at `$.stop[...]`": the path becomes `param`."""
    text, _, place = message.partition(" - at `")
    path = re.sub(r"\[\.\.\.\]|^\$\.?|`$", "", place)
    unknown = re.search(r"contains unknown field `(.*)`", text)
    if unknown is not None:
        return _unknown_field(kind, path, unknown[1])
    missing = re.search(r"missing required field `(.*)`", text)
    if missing is not None:
        name = _join(path, missing[1])
        return bad_request(name, f"{name} is required", "missing_required_parameter")
    return bad_request(path or None, f"{path or 'the body'}: {_plain(text)}")


def _unknown_field(kind: type[msgspec.Struct], path: str, name: str) -> ApiError:
    advice = REFUSED_FIELDS.get(name) or nearest(name, kind.__struct_fields__)
    message = f"{shown(name)} is not a field of this request" + (f": {advice}" if advice else "")
    return bad_request(_join(path, name)[:100], message, "unknown_parameter")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _plain(text: str) -> str:
    return text.replace("`", "").rstrip(".")[:300]
