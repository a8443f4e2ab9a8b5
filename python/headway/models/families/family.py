"""What a family provides, and the naming scheme that decoder blocks of two layers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from headway.errors import ModelLoadError
from headway.models.config import LayerKind, ModelConfig
from headway.models.hf import HfConfig
from headway.models.pieces import (
    MlpNames,
    MoeNames,
    Piece,
    attention_pieces,
    mamba_pieces,
    mlp_pieces,
    moe_pieces,
)


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint. `skipped` are prefixes of tensors that are known and not part of the served model."""

    model_type: str
    architecture: str
    read_config: Callable[[HfConfig], ModelConfig]
    pieces: Callable[[ModelConfig, str], Iterator[Piece]]  # (config, prefix of the names)
    prefixes: tuple[str, ...] = ("model",)  # any of these may start the names of the trunk
    skipped: tuple[str, ...] = ()


_GATED_MLP = MlpNames(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")


@dataclass(frozen=True)
class BlockNames:
    """Names in a decoder block of a mixer layer and a feed-forward layer, and of what surrounds the blocks."""

    mlp: MlpNames = _GATED_MLP
    moe: MoeNames | None = None
    mamba: str = "mamba"
    attention: str = "self_attn"
    mixer_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"


def block_pieces(config: ModelConfig, prefix: str, names: BlockNames) -> Iterator[Piece]:
    """Two of our layers, 2i and 2i + 1, are block i of the checkpoint."""
    yield from outer_pieces(config, f"{prefix}.{names.embedding}", f"{prefix}.{names.final_norm}")
    for layer_idx, kind in enumerate(config.layers):
        block, target = f"{prefix}.layers.{layer_idx // 2}", f"layers.{layer_idx}"
        norm = names.ffn_norm if layer_idx % 2 else names.mixer_norm
        yield Piece(f"{block}.{norm}.weight", (config.hidden_size,), f"{target}.norm")
        mixer = {"mamba": f"{block}.{names.mamba}", "attention": f"{block}.{names.attention}"}.get(
            kind, block
        )
        yield from layer_pieces(config, kind, mixer, target, names.mlp, names.moe)


def layer_pieces(
    config: ModelConfig, kind: LayerKind, source: str, target: str, mlp: MlpNames, moe: MoeNames | None
) -> Iterator[Piece]:
    """Weights of one layer but its norm."""
    if kind == "mamba" and config.mamba is not None:
        yield from mamba_pieces(source, target, config.mamba, config.hidden_size)
    elif kind == "attention" and config.attention is not None:
        yield from attention_pieces(source, target, config.attention, config.hidden_size)
    elif kind == "mlp" and config.mlp is not None:
        yield from mlp_pieces(source, target, mlp, config.mlp, config.hidden_size)
    elif kind == "moe" and config.moe is not None and moe is not None:
        yield from moe_pieces(source, target, moe, config.moe, config.hidden_size)


def outer_pieces(config: ModelConfig, embedding: str, final_norm: str) -> Iterator[Piece]:
    """Embedding, last norm and, where it is not the embedding's table, the head."""
    table = (config.vocab_size, config.hidden_size)
    yield Piece(f"{embedding}.weight", table, "embedding")
    yield Piece(f"{final_norm}.weight", (config.hidden_size,), "final_norm")
    if not config.tie_embeddings:
        yield Piece("lm_head.weight", table, "head")


def two_layer_blocks(mixers: list[LayerKind], feed_forward: list[LayerKind]) -> tuple[LayerKind, ...]:
    return tuple(kind for block in zip(mixers, feed_forward, strict=True) for kind in block)


def mixer_kinds(hf: HfConfig, num_layers: int) -> list[LayerKind] | None:
    """`layer_types` / `layers_block_type` as our kinds, None when the checkpoint does not list them."""
    listed = hf.get("layer_types", "layers_block_type")
    if listed is None:
        return None
    if not isinstance(listed, list) or len(listed) != num_layers:
        raise ModelLoadError(f"config.json: layer_types must list {num_layers} layers, got {listed!r}")
    return [layer_kind(name) for name in listed]


def layer_kind(name: object) -> LayerKind:
    """Our kind for a layer name of transformers, before or since version 5."""
    kind = _LAYER_NAMES.get(str(name))
    if kind is None:
        accepted = ", ".join(_LAYER_NAMES)
        raise ModelLoadError(f"config.json: layer type {name!r} is not supported, only {accepted}")
    return kind


_LAYER_NAMES: dict[str, LayerKind] = {
    "linear_attention": "mamba",
    "mamba": "mamba",
    "full_attention": "attention",
    "attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}
