"""The experts of a small batch on a GPU; see csrc/cuda/moe_experts.cu.

Arguments are those of `ops.moe_experts`, which checks them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.ops.backend import target_of
from headway.ops.checks import dtype_code
from headway.ops.records import ACTIVATION_CODES, ActivationKind, Routing

MAX_TOKENS = 256  # of a launch; beyond it, reading the weights no longer dominates
MAX_TOKENS_IN_PARTS = 1024  # without a grouped product; beyond it, the weights are read too often
MAX_PAIRS = 8192
MAX_EXPERTS = 1024


def fits_kernels(x: Tensor, top_k: int, num_experts: int, width: int) -> bool:
    """Whether the kernels take these sizes; they read weights in 16-byte pieces."""
    is_aligned = x.shape[1] % 8 == 0 and width % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    has_dtype = x.dtype in (torch.bfloat16, torch.float16)
    return has_dtype and is_aligned and top_k <= MAX_PAIRS and num_experts <= MAX_EXPERTS


def _small_batch_experts(
    x: Tensor, routing: Routing, w_in: Tensor, w_out: Tensor, activation: ActivationKind, is_gated: bool
) -> Tensor:
    """Two launches that read each chosen expert's weights once; the sum is in float32, in the order of expert ids."""
    num_tokens, hidden = x.shape
    num_experts, _, width = w_out.shape
    top_k = routing.expert_ids.shape[1]
    inner = torch.empty((num_tokens * top_k, width), dtype=x.dtype, device=x.device)
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
        out.data_ptr(),
        ACTIVATION_CODES[activation],
        is_gated,
        dtype_code("moe_experts", "x", x),
        stream,
    )
    return out


def experts_in_parts(
    x: Tensor, routing: Routing, w_in: Tensor, w_out: Tensor, activation: ActivationKind, is_gated: bool
) -> Tensor:
    """Of any number of tokens; a token's result is the same in every part."""
    size = min(MAX_TOKENS, MAX_PAIRS // max(1, routing.expert_ids.shape[1]))
    if x.shape[0] <= size:
        return _small_batch_experts(x, routing, w_in, w_out, activation, is_gated)
    outputs = []
    for begin in range(0, x.shape[0], size):
        part = slice(begin, begin + size)
        chosen = Routing(routing.weights[part], routing.expert_ids[part])
        outputs.append(_small_batch_experts(x[part], chosen, w_in, w_out, activation, is_gated))
    return torch.cat(outputs)
