"""From a checkpoint folder to a `HybridModel`: configuration, allocation on the device, weights."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from headway.errors import ConfigError, ModelLoadError
from headway.files import read_json_object
from headway.layers.params import ParamSpec
from headway.models.checkpoint import Checkpoint
from headway.models.config import ModelConfig
from headway.models.dummy import fill_dummy
from headway.models.families.family import Family
from headway.models.hybrid import HybridModel, model_specs
from headway.models.pieces import Piece
from headway.models.registry import config_file, config_from_dict, find_family

LOAD_FORMATS = ("auto", "safetensors", "dummy")

# (bytes loaded, bytes in all), called after each tensor
Progress = Callable[[int, int], None]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED_DTYPES = ("F64", "F32", "BF16", "F16")  # others need scales that this loader does not read
_MAX_NAMED = 8  # tensors listed in one error


@dataclass(frozen=True)
class LoadedModel:
    model: HybridModel
    config: ModelConfig


@dataclass(frozen=True)
class LoadedParams:
    """The weights by the names of `model_specs`."""

    params: dict[str, torch.Tensor]
    config: ModelConfig


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    load_format: str = "auto",
    progress: Progress | None = None,
    max_position: int | None = None,
    seed: int = 0,
    is_batch_invariant: bool = False,
) -> LoadedModel:
    """Loads a checkpoint folder onto one device. max_position: longest sequence to be served, default the
    checkpoint's; is_batch_invariant: as in `HybridModel`; the rest as in `load_params`.
    """
    loaded = load_params(
        path, dtype=dtype, device=device, load_format=load_format, progress=progress, seed=seed
    )
    model = HybridModel(
        loaded.config, loaded.params, max_position=max_position, is_batch_invariant=is_batch_invariant
    )
    return LoadedModel(model, loaded.config)


def load_params(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    load_format: str = "auto",
    progress: Progress | None = None,
    seed: int = 0,
) -> LoadedParams:
    """The weights of a checkpoint folder, packed as the layers take them.

    dtype: of matrices, caches and activations; "auto" = the checkpoint's. load_format: "dummy" needs config.json
    alone and draws weights from seed.

    Raises ModelLoadError naming what is missing, extra, misshapen or unsupported; ConfigError on a wrong argument.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"load_format must be one of {', '.join(LOAD_FORMATS)}, got {load_format!r}")
    file = config_file(path)
    values = read_json_object(file)
    config, family = config_from_dict(values), find_family(values)
    specs, model_dtype = model_specs(config), resolve_dtype(dtype, config)
    if load_format == "dummy":
        params = _allocate(specs, model_dtype, torch.device(device))
        fill_dummy(specs, params, len(config.layers), seed)
        return LoadedParams(params, config)
    with Checkpoint(file.parent) as checkpoint:
        pieces = _match(family, config, checkpoint)
        params = _allocate(specs, model_dtype, torch.device(device))
        _fill(params, pieces, checkpoint, progress)
    return LoadedParams(params, config)


def resolve_dtype(dtype: torch.dtype | str, config: ModelConfig) -> torch.dtype:
    """The dtype to serve in, from a name, "auto" or a torch dtype."""
    if isinstance(dtype, torch.dtype):
        if dtype not in _DTYPES.values():
            raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}")
        return dtype
    name = config.dtype if dtype == "auto" else dtype
    if name not in _DTYPES:
        raise ConfigError(f"dtype must be 'auto' or one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def _allocate(
    specs: dict[str, ParamSpec], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(spec.shape, dtype=torch.float32 if spec.is_float32 else dtype, device=device)
        for name, spec in specs.items()
    }


def _match(family: Family, config: ModelConfig, checkpoint: Checkpoint) -> list[Piece]:
    """The family's pieces, after the checkpoint was found to hold each of them and nothing else."""
    names = set(checkpoint.names())
    prefix = next(
        (prefix for prefix in family.prefixes if any(name.startswith(f"{prefix}.") for name in names)),
        family.prefixes[0],
    )
    pieces = list(family.pieces(config, prefix))
    wanted = {piece.source for piece in pieces}
    missing = [piece for piece in pieces if piece.source not in names]
    extra = sorted(name for name in names - wanted if not _is_known_extra(name, family, config))
    if missing:
        raise ModelLoadError(*_missing_message(missing, extra))
    if extra:
        raise ModelLoadError(
            f"the checkpoint has tensors that {family.architecture} does not: {_list(extra)}"
        )
    wrong = [(piece, shape) for piece in pieces if (shape := checkpoint.shape(piece.source)) != piece.shape]
    if wrong:
        listed = _list(
            [f"{piece.source} is {list(shape)}, expected {list(piece.shape)}" for piece, shape in wrong]
        )
        raise ModelLoadError(f"tensors do not have the shapes that config.json implies: {listed}")
    _refuse_dtypes(pieces, checkpoint)
    return pieces


def _refuse_dtypes(pieces: Sequence[Piece], checkpoint: Checkpoint) -> None:
    """Integers and fp8 would load as if they were the weights."""
    stored = [(piece.source, checkpoint.dtype(piece.source)) for piece in pieces]
    wrong = [f"{name} is {dtype}" for name, dtype in stored if dtype not in _STORED_DTYPES]
    if wrong:
        raise ModelLoadError(
            f"tensors must be stored as one of {', '.join(_STORED_DTYPES)}: {_list(wrong)}",
            hint="quantised checkpoints are not supported",
        )


def _missing_message(missing: Sequence[Piece], extra: Sequence[str]) -> tuple[str]:
    """Names, shapes and, for the first, the closest name that is there instead."""
    listed = _list([f"{piece.source} {list(piece.shape)}" for piece in missing])
    close = difflib.get_close_matches(missing[0].source, extra, n=1)
    hint = f"; closest present: {close[0]}" if close else ""
    if missing[0].source == "lm_head.weight":
        hint = "; where the head is the embedding's table, config.json says tie_word_embeddings: true"
    return (f"the checkpoint lacks tensors: {listed}{hint}",)


def _is_known_extra(name: str, family: Family, config: ModelConfig) -> bool:
    """Tensors left out on purpose: a tied head stored twice, rotary tables, the family's own list."""
    if name == "lm_head.weight" and config.tie_embeddings:
        return True
    return name.endswith("rotary_emb.inv_freq") or name.startswith(family.skipped)


def _fill(
    params: dict[str, torch.Tensor],
    pieces: Sequence[Piece],
    checkpoint: Checkpoint,
    progress: Progress | None,
) -> None:
    total = sum(math.prod(piece.shape) * params[piece.target].itemsize for piece in pieces)
    done = 0
    for piece in pieces:
        tensor = checkpoint.read(piece.source)
        if piece.transform is not None:
            tensor = piece.transform(tensor)
        target = params[piece.target]
        target[piece.index].copy_(tensor)
        done += tensor.numel() * target.itemsize
        if progress is not None:
            progress(done, total)


def _list(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MAX_NAMED} more" if len(items) > _MAX_NAMED else ""
    return ", ".join(items[:_MAX_NAMED]) + more
