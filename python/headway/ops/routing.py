"""Which experts a token goes to: the choice from given logits, or router and choice in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.errors import ArgumentError
from headway.ops.backend import target_of
from headway.ops.checks import (
    check_dense,
    check_index,
    check_inner_dense,
    check_same_dtype,
    check_shape,
    check_vector,
    dtype_code,
)
from headway.ops.records import SCORE_CODES, Routing, ScoreKind

MAX_FUSED_TOKENS = 128  # beyond, product and choice in launches of their own are quicker
NUM_ROUTE_GROUPS = 32  # kRouteGroups of csrc/params/moe.h
MAX_GPU_EXPERTS = 1024  # kMaxRoutedExperts of csrc/cuda/route_choice.cuh
MAX_GPU_EXPERT_GROUPS = 32  # kMaxGroups there


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
    check_choice(op, num_experts, top_k, score, bias, num_groups, topk_group)
    if not logits.is_cpu:
        _check_gpu_limits(op, num_experts, num_groups)
    routing = _empty_routing(num_tokens, top_k, logits.device)
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
        routing.weights.data_ptr(),
        routing.expert_ids.data_ptr(),
        stream,
    )
    return routing


def fits_route_hidden(hidden: Tensor, num_experts: int) -> bool:
    """Whether `route_hidden` takes these sizes: few tokens on a GPU, in 16-byte pieces."""
    is_small = hidden.shape[0] <= MAX_FUSED_TOKENS and num_experts <= MAX_GPU_EXPERTS
    return hidden.is_cuda and is_small and _is_aligned(hidden)


def _is_aligned(hidden: Tensor) -> bool:
    return hidden.shape[1] % 8 == 0 and hidden.stride(0) % 8 == 0 and hidden.data_ptr() % 16 == 0


def route_hidden(
    hidden: Tensor,
    router: Tensor,
    top_k: int,
    num_done: Tensor,
    *,
    score: ScoreKind = "softmax",
    bias: Tensor | None = None,
    normalise: bool = True,
    scale: float = 1.0,
    num_groups: int = 1,
    topk_group: int = 1,
) -> Routing:
    """`route` of the logits hidden router^T, both in one launch; for what `fits_route_hidden`.

    Args:
        hidden: [T, C].
        router: [E, C] float32, contiguous; products and sums are in float32.
        num_done: [NUM_ROUTE_GROUPS] int32, zero before and after; one for every call that may run at the same time.
        top_k, score, bias, normalise, scale, num_groups, topk_group: as in `route`.

    Returns:
        weights [T, K] float32 and expert ids [T, K] int32, best first.
    """
    op = "route_hidden"
    num_tokens, columns = hidden.shape
    num_experts = router.shape[0]
    check_inner_dense(op, "hidden", hidden)
    check_shape(op, "router", router, (num_experts, columns), "E, C")
    check_dense(op, "router", router)
    check_same_dtype(op, "router", router, torch.float32)
    check_index(op, "num_done", num_done, NUM_ROUTE_GROUPS, "NUM_ROUTE_GROUPS")
    check_choice(op, num_experts, top_k, score, bias, num_groups, topk_group)
    _check_gpu_limits(op, num_experts, num_groups)
    if not hidden.is_cuda or not _is_aligned(hidden):
        raise ArgumentError(
            f"{op}: hidden must be on a GPU, in pieces of 8 columns at 16 bytes, got {hidden.device}, shape "
            f"{list(hidden.shape)} and strides {hidden.stride()}"
        )
    routing = _empty_routing(num_tokens, top_k, hidden.device)
    logits = torch.empty((num_tokens, num_experts), dtype=torch.float32, device=hidden.device)
    kernels, stream = target_of(hidden)
    kernels.route_hidden(
        num_tokens,
        columns,
        num_experts,
        top_k,
        num_groups,
        topk_group,
        SCORE_CODES[score],
        normalise,
        scale,
        hidden.data_ptr(),
        hidden.stride(0),
        router.data_ptr(),
        logits.data_ptr(),
        num_done.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        routing.weights.data_ptr(),
        routing.expert_ids.data_ptr(),
        dtype_code(op, "hidden", hidden),
        stream,
    )
    return routing


def check_choice(
    op: str,
    num_experts: int,
    top_k: int,
    score: str,
    bias: Tensor | None,
    num_groups: int,
    topk_group: int,
) -> None:
    if score not in SCORE_CODES:
        raise ArgumentError(f"{op}: score must be one of {', '.join(SCORE_CODES)}, got {score!r}")
    if bias is not None:
        check_vector(op, "bias", bias, num_experts, "E")
        check_same_dtype(op, "bias", bias, torch.float32)
    if num_groups < 1 or num_experts % num_groups or not 1 <= topk_group <= num_groups:
        raise ArgumentError(
            f"{op}: num_groups must divide E = {num_experts} and topk_group lie in 1..num_groups, got "
            f"num_groups {num_groups}, topk_group {topk_group}"
        )
    num_competing = num_experts // num_groups * topk_group
    if not 1 <= top_k <= num_competing:
        raise ArgumentError(
            f"{op}: top_k must lie in 1..{num_competing}, the experts that compete, got {top_k}"
        )


def _check_gpu_limits(op: str, num_experts: int, num_groups: int) -> None:
    if num_experts > MAX_GPU_EXPERTS:
        raise ArgumentError(
            f"{op}: experts must be at most E = {MAX_GPU_EXPERTS} on a GPU, got {num_experts}"
        )
    if num_groups > MAX_GPU_EXPERT_GROUPS:
        raise ArgumentError(
            f"{op}: num_groups must be at most {MAX_GPU_EXPERT_GROUPS} on a GPU, got {num_groups}"
        )


def _empty_routing(num_tokens: int, top_k: int, device: torch.device) -> Routing:
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=device)
    return Routing(weights, torch.empty((num_tokens, top_k), dtype=torch.int32, device=device))
