"""Sampling defaults and end tokens that a checkpoint brings in generation_config.json."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.errors import ModelLoadError, RequestError
from headway.files import read_json_object
from headway.request import SamplingParams, is_int

logger = logging.getLogger("headway")

# Their name -> ours; everything else in the file is not about sampling or not ours to obey.
_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint wants unless the caller says otherwise."""

    params: SamplingParams
    eos_token_ids: tuple[int, ...]


def read_generation_defaults(folder: Path, *, is_applied: bool) -> GenerationDefaults:
    """Reads folder/generation_config.json. End tokens always count; sampling defaults only when `is_applied`.

    Logs one line naming what was changed. Raises ModelLoadError when the file is malformed.
    """
    path = folder / "generation_config.json"
    content = read_json_object(path, is_optional=True)
    changed = {ours: content[theirs] for theirs, ours in _NAMES.items() if content.get(theirs) is not None}
    if not is_applied or not changed:
        return GenerationDefaults(SamplingParams(), _eos_ids(content, path))
    try:
        params = SamplingParams(**changed)
    except RequestError as error:
        raise ModelLoadError(f"{path}: {error}", hint="pass --generation-config none to ignore it") from error
    listed = ", ".join(f"{name}={value}" for name, value in changed.items())
    logger.info("sampling defaults from %s: %s (--generation-config none ignores them)", path.name, listed)
    return GenerationDefaults(params, _eos_ids(content, path))


def _eos_ids(content: dict[str, Any], path: Path) -> tuple[int, ...]:
    value = content.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_int(token) for token in ids):
        raise ModelLoadError(f"{path}: eos_token_id must be a token id or a list of them, got {value!r}")
    return tuple(ids)
