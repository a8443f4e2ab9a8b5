"""Writes a checkpoint of random weights in a published shape, so that two engines can be timed on the same numbers.

What an engine does with a mixture of experts depends on its weights: where rows decode alike they choose the same few
experts, and a step reads far less than it would of a trained model. Here every token goes its own way: embeddings are
large beside what the layers add to them, so a row's hidden state is that of its last token, and the router's logits are
spread evenly. With 8 rows of 6 experts out of 128 about 41 experts are touched, as with uniform routing.

usage: python -m bench.random_checkpoint nano30b FOLDER [--device cuda]      (63 GB for nano30b: a RAM disk is quickest)
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.sides import for_peers, model_path
from headway.models.pieces import Piece
from headway.models.registry import config_from_dict, find_family

OUTPUT_GAIN = 0.05  # of what a layer adds, against embeddings of variance 1
NUM_WRITERS = 12
BOUNCE_BYTES = 32 * 2**20  # page-locked, one a writer
FLOAT32_PARTS = ("A_log", ".D", "dt_bias", "e_score_correction_bias")
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def random_tensor(piece: Piece, draws: torch.Generator) -> torch.Tensor:
    """Weights that keep activations near variance 1. fp32 for the small vectors that stay fp32, else bf16."""
    name, shape, dtype = piece.source, piece.shape, dtype_of(piece)

    def normal(std: float) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=draws.device).normal_(0.0, std, generator=draws)

    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return torch.ones(shape, dtype=dtype, device=draws.device)
    if name.endswith("A_log"):
        return torch.empty(shape, device=draws.device).uniform_(0.0, math.log(16.0), generator=draws)
    if name.endswith("dt_bias"):
        return torch.empty(shape, device=draws.device).uniform_(-7.0, -2.0, generator=draws)
    if "embedding" in name:
        return normal(1.0)
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype, device=draws.device)
    is_output = any(part in name for part in ("out_proj", "down_proj", "o_proj"))
    return normal((OUTPUT_GAIN if is_output else 1.0) / math.sqrt(shape[-1]))


def dtype_of(piece: Piece) -> torch.dtype:
    return torch.float32 if piece.source.endswith(FLOAT32_PARTS) else torch.bfloat16


def shards(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    """One a layer, one for the rest."""
    parts: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        layer = piece.target.split(".")[1] if piece.target.startswith("layers.") else "outer"
        parts[f"model-{layer}.safetensors"].append(piece)
    return parts


def write_shard(parts: list[Piece], draws: torch.Generator, file: Path) -> None:
    """The layout of safetensors: header length, header, tensors. The library's own writer makes two copies in fresh
    pageable memory on the way; at 60 GB that counts.
    """
    header, num_bytes = {}, 0
    for part in parts:
        dtype = dtype_of(part)
        begin, num_bytes = num_bytes, num_bytes + math.prod(part.shape) * dtype.itemsize
        header[part.source] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": part.shape,
            "data_offsets": (begin, num_bytes),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    preamble = struct.pack("<Q", len(text)) + text
    bounce = torch.empty(BOUNCE_BYTES, dtype=torch.uint8, pin_memory=draws.device.type == "cuda")
    with file.open("wb", buffering=0) as target:
        target.write(preamble)
        for part in parts:
            for piece in random_tensor(part, draws).view(-1).view(torch.uint8).split(BOUNCE_BYTES):
                target.write(bounce[: len(piece)].copy_(piece).numpy())


def write_checkpoint(shape: Path, folder: Path, device: str) -> None:
    values = json.loads(shape.read_text(encoding="utf-8"))
    family = find_family(values)
    pieces = list(family.pieces(config_from_dict(values), family.prefixes[0]))
    folder.mkdir(parents=True, exist_ok=True)

    def write(shard: tuple[int, tuple[str, list[Piece]]]) -> None:
        seed, (name, parts) = shard
        draws = torch.Generator(device).manual_seed(seed)
        write_shard(parts, draws, folder / name)

    by_name = shards(pieces)
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(pool.map(write, enumerate(by_name.items())))
    weight_map = {part.source: name for name, parts in by_name.items() for part in parts}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(for_peers(values), indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a file of bench/models: small, nano9b, nano30b ...")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    write_checkpoint(Path(model_path(args.model)), args.folder, args.device)


if __name__ == "__main__":
    main()
