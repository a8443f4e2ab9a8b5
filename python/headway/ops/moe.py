"""The experts' matrix products.

On a CPU the experts are one kernel whose results do not depend on a token's batch mates; on a GPU they are kernels
of `headway.ops.experts` where reading the weights dominates and torch's grouped products for larger batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.errors import ArgumentError
from headway.ops.backend import target_of
from headway.ops.checks import (
    check_dense,
    check_inner_dense,
    check_same_dtype,
    check_shape,
    dtype_code,
)
from headway.ops.experts import ExpertKernel, choose_kernel, experts_in_parts, fits_kernels
from headway.ops.pointwise import activation as activate
from headway.ops.pointwise import check_activation
from headway.ops.records import ACTIVATION_CODES, ActivationKind, Routing

TORCH_GROUPS = 1024  # so many are too many for torch.nn.functional.grouped_mm
MAX_GATHERED_BYTES = 64 * 2**20  # of weights copied for a product that torch does not group


def moe_experts(
    x: Tensor,
    routing: Routing,
    w_in: Tensor,
    w_out: Tensor,
    activation: ActivationKind,
    is_gated: bool,
    *,
    is_invariant: bool = False,
) -> Tensor:
    """Sum over each token's experts of weight * expert(x).

    Args:
        x: [T, C].
        routing: weights and ids [T, K].
        w_in: [E, F, C], or [E, 2F, C] with gate then up when gated; x's dtype.
        w_out: [E, C, F].
        activation: between the two products.
        is_gated: whether w_in has a gate.
        is_invariant: a token's result must not depend on the tokens beside it; 16-bit, C and F multiples of 8.

    Returns:
        [T, C] in x's dtype; the sum over experts is in float32.
    """
    op = "moe_experts"
    num_tokens, hidden = x.shape
    num_experts, columns, _ = w_in.shape
    top_k = routing.expert_ids.shape[1]
    width = columns // 2 if is_gated else columns
    check_inner_dense(op, "x", x)
    check_shape(op, "w_in", w_in, (num_experts, columns, hidden), "E, F or 2F, C")
    check_shape(op, "w_out", w_out, (num_experts, hidden, width), "E, C, F")
    for name, weight in (("w_in", w_in), ("w_out", w_out)):
        check_same_dtype(op, name, weight, x.dtype)
        check_dense(op, name, weight)
    _check_routing(op, routing, num_tokens)
    check_activation(op, "activation", activation)
    if not x.is_cpu:
        has_kernels = fits_kernels(x, top_k, num_experts, width)
        if is_invariant and not has_kernels:
            raise ArgumentError(
                f"{op}: x must be 16-bit, with C and F multiples of 8, where is_invariant; got {x.dtype} "
                f"{list(x.shape)} and F = {width}"
            )
        kernel = ExpertKernel.STREAMED if is_invariant else None
        if has_kernels and not is_invariant:
            kernel = choose_kernel(x, width, _are_grouped(w_in, w_out))
        if kernel is not None:
            return experts_in_parts(kernel, x, routing, w_in, w_out, activation, is_gated)
        return grouped_experts(x, routing, w_in, w_out, activation, is_gated)
    out = torch.empty((num_tokens, hidden), dtype=x.dtype)
    # fmt: off
    target_of(x).kernels.moe_experts(
        num_tokens, hidden, width, num_experts, top_k, x.data_ptr(), x.stride(0),
        routing.weights.data_ptr(), routing.expert_ids.data_ptr(), w_in.data_ptr(), w_out.data_ptr(),
        0, 0, out.data_ptr(), ACTIVATION_CODES[activation], is_gated, dtype_code(op, "x", x), 0,
    )
    # fmt: on
    return out


def _check_routing(op: str, routing: Routing, num_tokens: int) -> None:
    top_k = routing.expert_ids.shape[1]
    for name, tensor, dtype in (
        ("routing.weights", routing.weights, torch.float32),
        ("routing.expert_ids", routing.expert_ids, torch.int32),
    ):
        check_shape(op, name, tensor, (num_tokens, top_k), "T, K")
        check_same_dtype(op, name, tensor, dtype)
        check_dense(op, name, tensor)


def grouped_experts(
    x: Tensor, routing: Routing, w_in: Tensor, w_out: Tensor, activation: ActivationKind, is_gated: bool
) -> Tensor:
    """`moe_experts` with torch's grouped products: pairs of (token, expert) sorted by expert.

    All shapes follow from x and the routing's shape, so a CUDA graph can capture it (all but large products of what
    torch does not group: fp32, fp16, odd sizes, a thousand experts).
    """
    num_tokens, top_k = routing.expert_ids.shape
    by_expert = routing.expert_ids.flatten().sort(stable=True)
    experts = torch.arange(w_in.shape[0], dtype=torch.int32, device=x.device)
    ends = torch.searchsorted(by_expert.values, experts, right=True, out_int32=True)
    inner = grouped_product(x[by_expert.indices // top_k], w_in, ends)
    outer = grouped_product(activate(inner, activation, is_gated), w_out, ends)
    if outer.is_cuda:
        places = torch.empty_like(by_expert.values)
        places[by_expert.indices] = torch.arange(num_tokens * top_k, dtype=torch.int32, device=x.device)
        return combine_experts(outer, places.view(num_tokens, top_k), routing.weights)
    by_token = torch.empty_like(outer).index_copy_(0, by_expert.indices, outer)
    weighted = by_token.view(num_tokens, top_k, w_out.shape[1]).float() * routing.weights[:, :, None]
    return weighted.sum(1).to(x.dtype)


def combine_experts(results: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Sum over k of weights[t, k] * results[places[t, k]] on a GPU: results [T K, C], places [T, K] int32 -> [T, C]."""
    op = "combine_experts"
    (num_tokens, top_k), hidden = places.shape, results.shape[1]
    check_dense(op, "results", results)
    check_dense(op, "places", places)
    check_same_dtype(op, "places", places, torch.int32)
    check_shape(op, "weights", weights, (num_tokens, top_k), "T, K")
    check_same_dtype(op, "weights", weights, torch.float32)
    check_dense(op, "weights", weights)
    out = results.new_empty((num_tokens, hidden))
    kernels, stream = target_of(results)
    kernels.combine_experts(
        num_tokens,
        hidden,
        top_k,
        results.data_ptr(),
        places.data_ptr(),
        weights.data_ptr(),
        out.data_ptr(),
        dtype_code(op, "results", results),
        stream,
    )
    return out


def _are_grouped(*matrices: Tensor) -> bool:
    """Whether torch has one product for matrices [E, rows, columns] that does not look at the data on the host."""
    return all(
        weights.dtype == torch.bfloat16
        and weights.shape[0] < TORCH_GROUPS
        and weights.shape[1] % 8 == 0
        and weights.shape[2] % 8 == 0
        for weights in matrices
    )


def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows ends[e - 1] .. ends[e] of x [pairs, columns] times weights[e].T, weights [E, rows, columns]."""
    if _are_grouped(weights) and len(x):
        return torch.nn.functional.grouped_mm(x, weights.transpose(1, 2), offs=ends)
    if x.shape[0] * weights[0].numel() * weights.itemsize <= MAX_GATHERED_BYTES:
        pairs = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
        experts = torch.searchsorted(ends, pairs, right=True, out_int32=True)
        return torch.bmm(weights.index_select(0, experts), x.unsqueeze(2)).squeeze(2)
    result = x.new_empty((x.shape[0], weights.shape[1]))
    begin = 0
    for expert, end in enumerate(
        ends.tolist()
    ):  # waits for the device: the way of large products that torch does not group
        if end > begin:
            torch.matmul(x[begin:end], weights[expert].T, out=result[begin:end])
        begin = end
    return result
