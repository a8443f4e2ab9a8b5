"""The one model: embedding, a stack of pre-norm residual layers of four kinds, last norm, head.

Knows nothing of checkpoints, requests or scheduling; a step is a `StepBatch`, what it remembers is in `ModelCaches`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from headway import ops
from headway.layers.attention import Attention, AttentionScratch, attention_specs
from headway.layers.embedding import Embedding, Head, embedding_specs
from headway.layers.mamba2 import Mamba2, Mamba2Scratch, mamba2_specs
from headway.layers.mlp import Mlp, MlpScratch, mlp_specs
from headway.layers.moe import Moe, MoeScratch, moe_specs
from headway.layers.params import Params, ParamSpec
from headway.layers.rope import cos_sin_table
from headway.layers.scratch import Arena, Take
from headway.models.caches import ModelCaches
from headway.models.config import LayerKind, ModelConfig

if TYPE_CHECKING:
    from headway.engine.batch import StepBatch

# Steps of up to this many tokens use buffers that are allocated once; longer ones, prompt chunks, allocate their own.
_ARENA_TOKENS = 256


def model_specs(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every weight of the model by name: "embedding", "layers.3.in_proj", "final_norm" and so on."""
    specs = embedding_specs(config.vocab_size, config.hidden_size, config.tie_embeddings)
    for layer_idx, kind in enumerate(config.layers):
        specs[f"layers.{layer_idx}.norm"] = ParamSpec((config.hidden_size,), "ones")
        specs.update(
            {f"layers.{layer_idx}.{name}": spec for name, spec in _layer_specs(config, kind).items()}
        )
    specs["final_norm"] = ParamSpec((config.hidden_size,), "ones")
    return specs


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory of the weights when served in dtype, from the configuration alone (rotary table not included)."""
    return sum(spec.num_bytes(dtype) for spec in model_specs(config).values())


def _layer_specs(config: ModelConfig, kind: LayerKind) -> dict[str, ParamSpec]:
    if kind == "mamba" and config.mamba is not None:
        return mamba2_specs(config.mamba, config.hidden_size)
    if kind == "attention" and config.attention is not None:
        return attention_specs(config.attention, config.hidden_size)
    if kind == "mlp" and config.mlp is not None:
        return mlp_specs(config.mlp, config.hidden_size)
    if kind == "moe" and config.moe is not None:
        return moe_specs(config.moe, config.hidden_size)
    raise AssertionError(f"a {kind} layer without its settings")


class Layer(Protocol):
    """A mixer: hidden [T, C], normalised -> what it adds to the residual [T, C], in `out` or memory of its own."""

    def __call__(
        self, hidden: torch.Tensor, batch: StepBatch, caches: ModelCaches, scratch: Any, out: torch.Tensor
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Scratch:
    """Activations of one step of T tokens."""

    residual: torch.Tensor  # [T, C]
    normed: torch.Tensor  # [T, C]
    mixed: torch.Tensor  # [T, C], what the layer adds to the residual
    layers: tuple[object, ...]  # of each layer; layers of a kind share one


class HybridModel:
    """A loaded model. Weights are never changed; one thread (or stream) runs it at a time.

    params: all of `model_specs(config)`, on one device; matrices in one dtype. Emptied, so that a matrix that a layer
    repacks does not exist twice for longer than that takes.
    max_position: longest sequence to be served, bounds the rotary table; default the checkpoint's own.
    is_batch_invariant: a token's results do not depend on the tokens beside it (`headway.models.invariance`).
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, torch.Tensor],
        *,
        max_position: int | None = None,
        is_batch_invariant: bool = False,
    ) -> None:
        self.config = config
        self.dtype = params["embedding"].dtype
        self.device = params["embedding"].device
        self._embedding = Embedding(params, config.embedding_multiplier)
        self._is_invariant = is_batch_invariant
        self._head = Head(params, config.logits_divisor, is_batch_invariant)
        self._cos_sin = self._rotary_table(max_position or config.max_position)
        norms = [params.pop(f"layers.{layer_idx}.norm") for layer_idx in range(len(config.layers))]
        # [C] each: norms[i] comes before layer i, the last after all layers
        self._norms = (*norms, params["final_norm"])
        self._layers = tuple(self._build_layers(params))
        params.clear()
        self._arena = Arena(_ARENA_TOKENS, self.dtype, self.device)
        self._scratch: dict[int, Scratch] = {}

    @torch.inference_mode()
    def forward(self, batch: StepBatch, caches: ModelCaches) -> torch.Tensor:
        """Runs one step and returns hidden [T, C], normalised, valid until the next call."""
        scratch = self._scratch_for(batch.num_tokens)
        eps, residual_scale = self.config.norm_eps, self.config.residual_multiplier
        residual, normed = self._embedding(batch.token_ids, scratch.residual), scratch.normed
        ops.rms_norm(residual, self._norms[0], eps, out=normed)
        for layer, buffers, next_norm in zip(self._layers, scratch.layers, self._norms[1:], strict=True):
            mixed = layer(normed, batch, caches, buffers, scratch.mixed)
            ops.add_rms_norm(mixed, residual, next_norm, eps, residual_scale, out=normed)
        return normed

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [Rs, C], rows of what `forward` returned -> [Rs, V] float32."""
        return self._head(hidden)

    @torch.inference_mode()
    def fold_states(
        self, caches: ModelCaches, state_base: torch.Tensor, copies_address: int, num_copies: int
    ) -> None:
        """`ops.fold_states` in every Mamba layer: a step's StateCopy records, where states lag behind their rows."""
        for layer in self._layers:
            if isinstance(layer, Mamba2):
                layer.fold_states(caches, state_base, copies_address, num_copies)

    def _rotary_table(self, max_position: int) -> torch.Tensor | None:
        attention = self.config.attention
        if attention is None or attention.rope is None:
            return None
        return cos_sin_table(attention.rope, max_position, self.device)

    def _build_layers(self, params: dict[str, torch.Tensor]) -> Iterator[Layer]:
        num_built: Counter[LayerKind] = Counter()
        for layer_idx, kind in enumerate(self.config.layers):
            prefix = f"layers.{layer_idx}."
            names = [name for name in params if name.startswith(prefix)]
            own = {name.removeprefix(prefix): params.pop(name) for name in names}
            yield self._build_layer(kind, own, num_built[kind])
            num_built[kind] += 1

    def _build_layer(self, kind: LayerKind, params: Params, cache_idx: int) -> Layer:
        config = self.config
        if kind == "mamba" and config.mamba is not None:
            return Mamba2(config.mamba, config.norm_eps, params, cache_idx, self._is_invariant)
        if kind == "attention" and config.attention is not None:
            eps, cos_sin = config.norm_eps, self._cos_sin
            return Attention(config.attention, eps, params, cache_idx, cos_sin, self._is_invariant)
        if kind == "mlp" and config.mlp is not None:
            return Mlp(config.mlp, params, self._is_invariant)
        if kind == "moe" and config.moe is not None:
            return Moe(config.moe, params, self._is_invariant)
        raise AssertionError(f"a {kind} layer without its settings")

    def _scratch_for(self, num_tokens: int) -> Scratch:
        """Buffers of a step; the views of short steps are made once for each length."""
        scratch = self._scratch.get(num_tokens)
        if scratch is None:
            scratch = self._new_scratch(self._arena.take(num_tokens))
            if num_tokens <= self._arena.max_tokens:
                self._scratch[num_tokens] = scratch
        return scratch

    def _new_scratch(self, take: Take) -> Scratch:
        config = self.config
        of_kind: dict[LayerKind, object] = {}
        if config.mamba is not None:
            of_kind["mamba"] = Mamba2Scratch.allocate(config.mamba, take)
        if config.attention is not None:
            of_kind["attention"] = AttentionScratch.allocate(config.attention, take)
        if config.mlp is not None:
            of_kind["mlp"] = MlpScratch.allocate(config.mlp, take)
        if config.moe is not None:
            of_kind["moe"] = MoeScratch.allocate(config.moe, config.hidden_size, take)
        return Scratch(
            residual=take("residual", config.hidden_size, None),
            normed=take("normed", config.hidden_size, None),
            mixed=take("mixed", config.hidden_size, None),
            layers=tuple(of_kind[kind] for kind in config.layers),
        )
