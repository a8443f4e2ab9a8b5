"""Finds a checkpoint's family and reads its configuration. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from headway.errors import ModelLoadError
from headway.files import read_json_object
from headway.models.config import ModelConfig
from headway.models.families.bamba import BAMBA
from headway.models.families.family import Family
from headway.models.families.granitemoehybrid import GRANITE_MOE_HYBRID
from headway.models.families.llama import LLAMA
from headway.models.families.mamba2 import MAMBA2
from headway.models.families.mixtral import MIXTRAL
from headway.models.families.nemotron_h import NEMOTRON_H
from headway.models.families.qwen3 import QWEN3, QWEN3_MOE
from headway.models.hf import HfConfig

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (NEMOTRON_H, BAMBA, GRANITE_MOE_HYBRID, MAMBA2, LLAMA, QWEN3, QWEN3_MOE, MIXTRAL)
}


def read_model_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Configuration of the checkpoint in a folder (or of a bare config.json), from its config.json alone.

    Raises ModelLoadError naming the key when the model cannot be served.
    """
    return config_from_dict(read_json_object(config_file(path)))


def config_from_dict(values: dict[str, object]) -> ModelConfig:
    """Configuration from the dictionary of a `config.json`."""
    hf = HfConfig(values)
    hf.accept_only("quantization_config", why="quantised checkpoints are not supported")
    config = find_family(values).read_config(hf)
    _check(config)
    return config


def find_family(values: dict[str, object]) -> Family:
    """By `architectures`, else by `model_type`. Raises ModelLoadError listing what is supported."""
    architectures = values.get("architectures") or []
    names = architectures if isinstance(architectures, list) else [architectures]
    for family in FAMILIES.values():
        if family.architecture in names or (not names and family.model_type == values.get("model_type")):
            return family
    supported = ", ".join(f"{family.model_type} ({family.architecture})" for family in FAMILIES.values())
    what = names[0] if names else values.get("model_type")
    raise ModelLoadError(
        f"config.json: architecture {what!r} is not supported", hint=f"supported: {supported}"
    )


def config_file(path: str | os.PathLike[str]) -> Path:
    """The config.json of a checkpoint folder; a path to a .json file is taken as it is."""
    location = Path(path)
    if location.suffix == ".json" and location.is_file():
        return location
    if not location.is_dir():
        raise ModelLoadError(f"{os.fspath(path)!r} is not a folder", hint="give a local checkpoint folder")
    if not (location / "config.json").is_file():
        raise ModelLoadError(f"{os.fspath(path)!r} has no config.json")
    return location / "config.json"


def _check(config: ModelConfig) -> None:
    """What every family must satisfy, said with the numbers."""
    if config.max_position < 2:
        raise ModelLoadError(
            f"config.json: max_position_embeddings must be at least 2, got {config.max_position}"
        )
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "layers": len(config.layers)}
    if config.mamba is not None:
        mamba = config.mamba
        sizes |= {"mamba heads": mamba.num_heads, "mamba head_dim": mamba.head_dim}
        sizes |= {"mamba groups": mamba.num_groups, "mamba state_size": mamba.state_size}
        if mamba.num_groups and mamba.num_heads % mamba.num_groups:
            raise ModelLoadError(
                f"config.json: {mamba.num_groups} Mamba groups do not divide {mamba.num_heads} heads"
            )
        if not 2 <= mamba.conv_width <= 4:
            raise ModelLoadError(f"config.json: conv_kernel must be 2 to 4, got {mamba.conv_width}")
    if config.moe is not None:
        moe = config.moe
        sizes |= {
            "experts": moe.num_experts,
            "experts a token": moe.top_k,
            "expert width": moe.intermediate_size,
        }
        if moe.top_k > moe.num_experts:
            raise ModelLoadError(
                f"config.json: num_experts_per_tok is {moe.top_k}, there are {moe.num_experts} experts"
            )
    for name, size in sizes.items():
        if size < 1:
            raise ModelLoadError(f"config.json: {name} must be at least 1, got {size}")
