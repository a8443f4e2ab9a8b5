"""The tensors of a Hugging Face folder: safetensors files read by memory map, one or sharded. Never pickle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from headway.errors import ModelLoadError
from headway.files import read_json_object

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class Checkpoint:
    """Open shards and where each tensor is. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._shards: dict[str, Any] = {}  # tensor name -> open file
        try:
            for file in shard_files(folder):
                shard = self._stack.enter_context(_open(file))
                self._shards.update(dict.fromkeys(shard.keys(), shard))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> Iterator[str]:
        return iter(self._shards)

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._shards[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors spells it: F32, BF16, I8 and so on."""
        return str(self._shards[name].get_slice(name).get_dtype())

    def read(self, name: str) -> torch.Tensor:
        """On the CPU, backed by the file where possible."""
        tensor: torch.Tensor = self._shards[name].get_tensor(name)
        return tensor


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises ModelLoadError when there are none or one leads elsewhere."""
    if (folder / _INDEX).is_file():
        weight_map = read_json_object(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelLoadError(f"{_INDEX} has no weight_map")
        return [_inside(folder, name) for name in sorted({str(name) for name in weight_map.values()})]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if any(file.suffix in _PICKLED for file in folder.iterdir()):
        raise ModelLoadError(
            f"{os.fspath(folder)!r} holds pickled weights only, which can run code when loaded",
            hint="convert them to safetensors with save_pretrained(..., safe_serialization=True)",
        )
    raise ModelLoadError(
        f"{os.fspath(folder)!r} has neither {_SINGLE} nor {_INDEX}",
        hint="use load_format 'dummy' for random weights",
    )


def _inside(folder: Path, name: str) -> Path:
    """A shard by its name alone: a path that leads out of the folder is refused."""
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise ModelLoadError(
            f"{_INDEX} names the shard {name!r}, which is not a safetensors file of the folder"
        )
    if not (folder / name).is_file():
        raise ModelLoadError(f"{_INDEX} names the shard {name!r}, which is missing")
    return folder / name


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file.name} is not a readable safetensors file: {error}") from error
