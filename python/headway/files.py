"""Reads a checkpoint folder's small text files; whatever is wrong with one is told by its path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headway.errors import ModelLoadError


def read_text(path: Path) -> str:
    """The file's text. Raises ModelLoadError when it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error


def read_json_object(path: Path, *, is_optional: bool = False) -> dict[str, Any]:
    """The file's JSON object; empty when an optional file is not there.

    Raises:
        ModelLoadError: it cannot be read, is not JSON, or holds something else than an object.
    """
    if is_optional and not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
