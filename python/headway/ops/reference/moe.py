"""Activations, routing and experts in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.ops.records import ActivationKind, Routing, ScoreKind
from headway.ops.reference.common import deliver, silu, wide


def activate(x: Tensor, kind: ActivationKind) -> Tensor:
    if kind == "silu":
        return silu(x)
    if kind == "relu2":
        return torch.relu(x).square()
    return torch.nn.functional.gelu(x)


def activation_ref(x: Tensor, kind: ActivationKind, is_gated: bool, *, out: Tensor | None = None) -> Tensor:
    """act(gate) * up with x = [gate | up] when gated, else act(x): [T, 2F or F] -> [T, F]."""
    values = wide(x)
    if is_gated:
        gate, up = values.chunk(2, dim=-1)
        return deliver(activate(gate, kind) * up, x.dtype, out)
    return deliver(activate(values, kind), x.dtype, out)


def route_ref(
    logits: Tensor,
    top_k: int,
    *,
    score: ScoreKind = "softmax",
    bias: Tensor | None = None,
    normalise: bool = True,
    scale: float = 1.0,
    num_groups: int = 1,
    topk_group: int = 1,
) -> Routing:
    """Chooses top_k of E experts per token: logits [T, E]. Ties go to the lower id."""
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    biased = scores if bias is None else scores + bias
    if num_groups > 1 and topk_group < num_groups:
        biased = biased.masked_fill(~_kept_groups(biased, num_groups, topk_group), float("-inf"))
    chosen = biased.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, chosen)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(weights * scale, chosen.int())


def _kept_groups(biased: Tensor, num_groups: int, topk_group: int) -> Tensor:
    """[T, E] true where the expert's group is among the topk_group best by the sum of its two best scores."""
    grouped = biased.reshape(len(biased), num_groups, biased.shape[1] // num_groups)
    group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    best = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
    kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    return kept.repeat_interleave(grouped.shape[-1], dim=-1)


def moe_experts_ref(
    x: Tensor, routing: Routing, w_in: Tensor, w_out: Tensor, activation: ActivationKind, is_gated: bool
) -> Tensor:
    """Sum over a token's experts of weight * expert(x): x [T, C], w_in [E, F or 2F, C], w_out [E, C, F]."""
    result = torch.zeros_like(wide(x))
    for expert in range(w_in.shape[0]):
        tokens, places = torch.where(routing.expert_ids == expert)
        hidden = activation_ref(wide(x[tokens]) @ wide(w_in[expert]).T, activation, is_gated)
        weights = routing.weights[tokens, places].to(hidden.dtype)
        result.index_add_(0, tokens, weights[:, None] * (hidden @ wide(w_out[expert]).T))
    return result.to(x.dtype)
