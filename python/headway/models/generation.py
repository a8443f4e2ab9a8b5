"""`generation_config.json`: the checkpoint's own sampling defaults and end tokens. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from headway.models.hf import HfConfig
from headway.models.registry import config_file, read_json


@dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint suggests; None where it says nothing."""

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


def read_generation_config(path: str | os.PathLike[str]) -> GenerationConfig:
    """From generation_config.json, with end tokens from config.json where it names none.

    A checkpoint without the file has no suggestions. Raises ModelLoadError on a value of the wrong type.
    """
    file = config_file(path)
    model = HfConfig(read_json(file))
    beside = file.parent / "generation_config.json"
    hf = HfConfig(read_json(beside) if beside.is_file() else {})
    return GenerationConfig(
        eos_token_ids=hf.id_list("eos_token_id") or model.id_list("eos_token_id"),
        bos_token_id=next(iter(hf.id_list("bos_token_id") or model.id_list("bos_token_id")), None),
        pad_token_id=next(iter(hf.id_list("pad_token_id") or model.id_list("pad_token_id")), None),
        temperature=hf.number("temperature") if hf.has("temperature") else None,
        top_p=hf.number("top_p") if hf.has("top_p") else None,
        top_k=hf.integer("top_k") if hf.has("top_k") else None,
        repetition_penalty=hf.number("repetition_penalty") if hf.has("repetition_penalty") else None,
        max_new_tokens=hf.integer("max_new_tokens") if hf.has("max_new_tokens") else None,
    )
