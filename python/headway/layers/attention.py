"""Grouped-query attention over paged keys and values, with rotary positions or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headway import ops
from headway.layers.linear import Linear
from headway.layers.params import Params, ParamSpec
from headway.layers.scratch import Take
from headway.models.config import AttentionConfig

if TYPE_CHECKING:
    from headway.engine.batch import StepBatch
    from headway.models.caches import ModelCaches


def attention_specs(attention: AttentionConfig, hidden_size: int) -> dict[str, ParamSpec]:
    q_dim = attention.num_heads * attention.head_dim
    qkv_dim = q_dim + 2 * attention.num_kv_heads * attention.head_dim
    specs = {
        "qkv_proj": ParamSpec((qkv_dim, hidden_size)),  # rows: q, k, v
        "out_proj": ParamSpec((hidden_size, q_dim), "output"),
    }
    if attention.qkv_bias:
        specs["qkv_bias"] = ParamSpec((qkv_dim,), "zeros")
    if attention.out_bias:
        specs["out_bias"] = ParamSpec((hidden_size,), "zeros")
    if attention.has_qk_norm:
        specs["q_norm"] = ParamSpec((attention.head_dim,), "ones")
        specs["k_norm"] = ParamSpec((attention.head_dim,), "ones")
    return specs


@dataclass(frozen=True)
class AttentionScratch:
    """Buffers of one step and the views the ops take."""

    qkv: torch.Tensor  # [T, (Hq + 2 Hkv) * D]
    q: torch.Tensor  # [T, Hq, D], a slice of qkv, likewise below
    k: torch.Tensor  # [T, Hkv, D]
    v: torch.Tensor  # [T, Hkv, D]
    mixed_heads: torch.Tensor  # [T, Hq, D]
    mixed: torch.Tensor  # [T, Hq * D], the same memory

    @classmethod
    def allocate(cls, attention: AttentionConfig, take: Take) -> AttentionScratch:
        head_dim = attention.head_dim
        q_dim, kv_dim = attention.num_heads * head_dim, attention.num_kv_heads * head_dim
        qkv = take("attention_qkv", q_dim + 2 * kv_dim, None)
        q, k, v = (
            torch.unflatten(part, 1, (-1, head_dim))
            for part in torch.split(qkv, [q_dim, kv_dim, kv_dim], dim=1)
        )
        mixed = take("attention_mixed", q_dim, None)
        return cls(qkv, q, k, v, torch.unflatten(mixed, 1, (-1, head_dim)), mixed)


class Attention:
    """One layer. `cache_idx` counts attention layers from 0; cos_sin is None where positions are not encoded."""

    def __init__(
        self,
        attention: AttentionConfig,
        norm_eps: float,
        params: Params,
        cache_idx: int,
        cos_sin: torch.Tensor | None,
        is_invariant: bool = False,
    ) -> None:
        self.qkv_proj = Linear(params["qkv_proj"], params.get("qkv_bias"), is_invariant=is_invariant)
        self.out_proj = Linear(params["out_proj"], params.get("out_bias"), is_invariant=is_invariant)
        self.q_norm, self.k_norm = params.get("q_norm"), params.get("k_norm")
        self.norm_eps = norm_eps
        self.scale = attention.scale
        self.cos_sin = cos_sin
        self.cache_idx = cache_idx

    def __call__(
        self,
        hidden: torch.Tensor,
        batch: StepBatch,
        caches: ModelCaches,
        scratch: AttentionScratch,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """hidden [T, C] -> out [T, C]; appends the step's keys and values to the rows' blocks."""
        keys, values = caches.keys[self.cache_idx], caches.values[self.cache_idx]
        self.qkv_proj.into(hidden, scratch.qkv)
        q, k = self._normalised(scratch)
        if self.cos_sin is not None:
            ops.rotary(q, k, batch.positions, self.cos_sin)
        ops.kv_write(
            k, scratch.v, keys, values, batch.block_table, batch.rows, batch.token_rows, batch.positions
        )
        ops.paged_attention(
            q,
            keys,
            values,
            batch.block_table,
            batch.rows,
            batch.query_start,
            batch.row_start,
            batch.max_query_len,
            batch.max_kv_len,
            self.scale,
            out=scratch.mixed_heads,
        )
        return self.out_proj(scratch.mixed, out)

    def _normalised(self, scratch: AttentionScratch) -> tuple[torch.Tensor, torch.Tensor]:
        """q [T, Hq, D] and k [T, Hkv, D], normalised over D where the model asks for it."""
        if self.q_norm is None or self.k_norm is None:
            return scratch.q, scratch.k
        return _norm_heads(scratch.q, self.q_norm, self.norm_eps), _norm_heads(
            scratch.k, self.k_norm, self.norm_eps
        )


def _norm_heads(heads: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return ops.rms_norm(heads.reshape(-1, heads.shape[-1]), weight, eps).view(heads.shape)
