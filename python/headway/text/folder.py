"""Reads a checkpoint folder's small text files; whatever is wrong with one is told by its path."""

from __future__ import annotations

import json
from pathlib import Path

from headway.errors import ModelLoadError


def read_text(path: Path) -> str:
    """The file's text. Raises ModelLoadError when it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error


def read_json_object(path: Path) -> dict[str, object]:
    """The file's JSON object; empty when there is no such file. Raises ModelLoadError when it holds anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def special_token_text(value: object) -> str | None:
    """The token in `"eos_token": "</s>"` or `"eos_token": {"content": "</s>", ...}`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Text of bos_token, eos_token, pad_token and unk_token, as far as the checkpoint names them."""
    sources = [
        read_json_object(folder / name) for name in ("special_tokens_map.json", "tokenizer_config.json")
    ]
    tokens: dict[str, str] = {}
    for source in sources:
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            text = special_token_text(source.get(name))
            if text is not None:
                tokens[name] = text
    return tokens
