"""What a checkpoint folder calls its special tokens."""

from __future__ import annotations

from pathlib import Path

from headway.files import read_json_object


def special_token_text(value: object) -> str | None:
    """The token in `"eos_token": "</s>"` or `"eos_token": {"content": "</s>", ...}`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Text of bos_token, eos_token, pad_token and unk_token, as far as the checkpoint names them."""
    sources = [
        read_json_object(folder / name, is_optional=True)
        for name in ("special_tokens_map.json", "tokenizer_config.json")
    ]
    tokens: dict[str, str] = {}
    for source in sources:
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            text = special_token_text(source.get(name))
            if text is not None:
                tokens[name] = text
    return tokens
