"""Routing, and the experts' matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.ops.backend import target_of
from headway.ops.checks import check_dense, check_same_dtype, check_shape, check_vector
from headway.ops.pointwise import activation as activate
from headway.ops.records import SCORE_CODES, ActivationKind, Routing, ScoreKind


def route(
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
    """Chooses top_k experts per token; ties go to the lower id.

    Args:
        logits: [T, E] float32, contiguous.
        top_k: K experts a token.
        score: softmax or sigmoid of the logits.
        bias: [E] float32; steers the choice, not the weights.
        normalise: weights sum to 1 over the chosen.
        scale: factor of the weights, applied last.
        num_groups: groups the experts fall into; 1 = none.
        topk_group: groups that compete, by the sum of their two best biased scores.

    Returns:
        weights [T, K] float32 and expert ids [T, K] int32, best first.
    """
    op = "route"
    num_tokens, num_experts = logits.shape
    check_dense(op, "logits", logits)
    check_same_dtype(op, "logits", logits, torch.float32)
    if bias is not None:
        check_vector(op, "bias", bias, num_experts, "E")
        check_same_dtype(op, "bias", bias, torch.float32)
    if num_experts % num_groups or not 1 <= topk_group <= num_groups:
        raise ValueError(
            f"{op}: num_groups must divide E = {num_experts} and topk_group lie in 1..num_groups, got "
            f"num_groups {num_groups}, topk_group {topk_group}"
        )
    num_competing = num_experts // num_groups * topk_group
    if not 1 <= top_k <= num_competing:
        raise ValueError(f"{op}: top_k must lie in 1..{num_competing}, the experts that compete, got {top_k}")
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    expert_ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    kernels, stream = target_of(logits)
    kernels.route(
        num_tokens,
        num_experts,
        top_k,
        num_groups,
        topk_group,
        SCORE_CODES[score],
        normalise,
        scale,
        logits.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        weights.data_ptr(),
        expert_ids.data_ptr(),
        stream,
    )
    return Routing(weights, expert_ids)


def moe_experts(
    x: Tensor, routing: Routing, w_in: Tensor, w_out: Tensor, activation: ActivationKind, is_gated: bool
) -> Tensor:
    """Sum over each token's experts of weight * expert(x).

    Args:
        x: [T, C].
        routing: weights and ids [T, K].
        w_in: [E, F, C], or [E, 2F, C] with gate then up when gated; x's dtype.
        w_out: [E, C, F].
        activation: between the two products.
        is_gated: whether w_in has a gate.

    Returns:
        [T, C] in x's dtype; the sum over experts is in float32, in the order of the routing.
    """
    op = "moe_experts"
    num_tokens, hidden = x.shape
    num_experts, columns, _ = w_in.shape
    width = columns // 2 if is_gated else columns
    check_shape(op, "w_in", w_in, (num_experts, columns, hidden), "E, F or 2F, C")
    check_shape(op, "w_out", w_out, (num_experts, hidden, width), "E, C, F")
    check_same_dtype(op, "w_in", w_in, x.dtype)
    check_same_dtype(op, "w_out", w_out, x.dtype)
    top_k = routing.expert_ids.shape[1]
    check_shape(op, "routing.weights", routing.weights, (num_tokens, top_k), "T, K")
    order = routing.expert_ids.flatten().sort(stable=True)
    counts = torch.bincount(order.values, minlength=num_experts)
    tokens = order.indices // top_k
    grouped = x[tokens]
    results = torch.empty_like(grouped)
    begin = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            end = begin + count
            inner = activate(grouped[begin:end] @ w_in[expert].T, activation, is_gated)
            torch.matmul(inner, w_out[expert].T, out=results[begin:end])
            begin = end
    by_pair = torch.empty_like(results)
    by_pair[order.indices] = results
    weighted = by_pair.view(num_tokens, top_k, hidden).float() * routing.weights[:, :, None]
    return weighted.sum(1).to(x.dtype)
