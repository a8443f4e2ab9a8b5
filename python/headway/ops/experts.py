"""The experts of batches on a GPU for which reading the weights dominates.

Few tokens: csrc/cuda/moe_experts.cu, two launches that read an expert's weights once for every 8 or 16 of its tokens.
More tokens, on Hopper: csrc/cuda/moe_warpgroup.cu, three launches that read them once for every 64.
Arguments are those of `ops.moe_experts`, which checks them.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from headway.ops.backend import target_of
from headway.ops.checks import dtype_code
from headway.ops.records import ACTIVATION_CODES, ActivationKind, Routing

MAX_TOKENS = 256  # of a streamed launch; beyond it, reading the weights no longer dominates
MAX_TOKENS_IN_PARTS = 1024  # without a grouped product; beyond it, the weights are read too often
MAX_TOKENS_OF_WARPGROUPS = 1024  # beyond it torch's grouped products are as fast
# Up to here the streamed kernel is faster, by the experts' width: short sums cost it more than reading the weights.
MAX_STREAMED_TOKENS_WIDE = 64
MAX_STREAMED_TOKENS_NARROW = 4
MIN_WIDE = 1024
MAX_PAIRS = 8192
MAX_EXPERTS = 1024


class ExpertKernel(Enum):
    """A token's result is the same to the bit alone and in any batch of one kernel, not between the two."""

    STREAMED = "streamed"
    WARPGROUPS = "warpgroups"


def fits_kernels(x: Tensor, top_k: int, num_experts: int, width: int) -> bool:
    """Whether the kernels take these sizes; they read weights in 16-byte pieces."""
    is_aligned = x.shape[1] % 8 == 0 and width % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    has_dtype = x.dtype in (torch.bfloat16, torch.float16)
    return has_dtype and is_aligned and top_k <= MAX_PAIRS and num_experts <= MAX_EXPERTS


def choose_kernel(x: Tensor, width: int, is_grouped: bool) -> ExpertKernel | None:
    """The fastest for sizes that fit; None where grouped products are, which torch has if is_grouped."""
    num_tokens = x.shape[0]
    few = MAX_STREAMED_TOKENS_WIDE if width >= MIN_WIDE else MAX_STREAMED_TOKENS_NARROW
    if few < num_tokens <= MAX_TOKENS_OF_WARPGROUPS and target_of(x).kernels.has_warpgroup_experts():
        return ExpertKernel.WARPGROUPS
    max_tokens = MAX_TOKENS if is_grouped else MAX_TOKENS_IN_PARTS
    return ExpertKernel.STREAMED if num_tokens <= max_tokens else None


def experts_in_parts(
    kernel: ExpertKernel,
    x: Tensor,
    routing: Routing,
    w_in: Tensor,
    w_out: Tensor,
    activation: ActivationKind,
    is_gated: bool,
) -> Tensor:
    """Of any number of tokens; a token's result is the same in every part.

    The sum is in float32, in the order of expert ids where streamed, in the routing's by warpgroups.
    """
    size = MAX_PAIRS // max(1, routing.expert_ids.shape[1])
    if kernel is ExpertKernel.STREAMED:
        size = min(size, MAX_TOKENS)
    if x.shape[0] <= size:
        return _experts(kernel, x, routing, w_in, w_out, activation, is_gated)
    outputs = []
    for begin in range(0, x.shape[0], size):
        part = slice(begin, begin + size)
        chosen = Routing(routing.weights[part], routing.expert_ids[part])
        outputs.append(_experts(kernel, x[part], chosen, w_in, w_out, activation, is_gated))
    return torch.cat(outputs)


def _experts(
    kernel: ExpertKernel,
    x: Tensor,
    routing: Routing,
    w_in: Tensor,
    w_out: Tensor,
    activation: ActivationKind,
    is_gated: bool,
) -> Tensor:
    num_tokens, hidden = x.shape
    num_experts, _, width = w_out.shape
    top_k = routing.expert_ids.shape[1]
    num_pairs = num_tokens * top_k
    inner = torch.empty((num_pairs, width), dtype=x.dtype, device=x.device)
    results = None
    if kernel is ExpertKernel.WARPGROUPS:
        results = torch.empty((num_pairs, hidden), dtype=torch.float32, device=x.device)
    out = torch.empty((num_tokens, hidden), dtype=x.dtype, device=x.device)
    kernels, stream = target_of(x)
    kernels.moe_experts(
        num_tokens,
        hidden,
        width,
        num_experts,
        top_k,
        x.data_ptr(),
        x.stride(0),
        routing.weights.data_ptr(),
        routing.expert_ids.data_ptr(),
        w_in.data_ptr(),
        w_out.data_ptr(),
        inner.data_ptr(),
        0 if results is None else results.data_ptr(),
        out.data_ptr(),
        ACTIVATION_CODES[activation],
        is_gated,
        dtype_code("moe_experts", "x", x),
        stream,
    )
    return out
