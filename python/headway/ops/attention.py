"""Rotary embedding, and attention over keys and values kept in blocks.

Position p of row r lives in block `block_table[r, p // S]` at offset `p % S`. All index tensors are int32.
"""

from __future__ import annotations

from typing import Final

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
    dtype_code,
    output_like,
)

MAX_DECODE_QUERIES: Final = 8  # kMaxDecodeQueries of csrc/cuda/attention.h
MAX_GPU_ROWS: Final = 8192  # kMaxAttentionRows there
MAX_GPU_HEAD_DIM: Final = 512  # kMaxHeadDim of csrc/cuda/attention_generic.cu


def min_prompt_queries(device_type: str, dtype: torch.dtype) -> int:
    """Rows of so many queries and more get the same bits however their prompt is cut into such rows; 1: all do."""
    return MAX_DECODE_QUERIES + 1 if device_type == "cuda" and dtype != torch.float32 else 1


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """Rotates the first rotary_dim channels of every head in place; channel i pairs with i + rotary_dim / 2.

    Args:
        q: [T, Hq, D], tokens may be strided, likewise k.
        k: [T, Hkv, D], same dtype.
        positions: [T] absolute.
        cos_sin: [max_position, rotary_dim] float32: cosines of the rotary_dim / 2 angles, then their sines.
    """
    op = "rotary"
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    rotary_dim = cos_sin.shape[1]
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise ArgumentError(
            f"{op}: cos_sin must have an even number of columns up to D = {head_dim}, got {rotary_dim}"
        )
    check_shape(op, "k", k, (num_tokens, num_kv_heads, head_dim), "T, Hkv, D")
    check_inner_dense(op, "q", q)
    check_inner_dense(op, "k", k)
    check_same_dtype(op, "k", k, q.dtype)
    check_dense(op, "cos_sin", cos_sin)
    check_same_dtype(op, "cos_sin", cos_sin, torch.float32)
    check_index(op, "positions", positions, num_tokens, "T")
    kernels, stream = target_of(q)
    kernels.rotary(
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        rotary_dim,
        q.data_ptr(),
        q.stride(0),
        k.data_ptr(),
        k.stride(0),
        positions.data_ptr(),
        cos_sin.data_ptr(),
        dtype_code(op, "q", q),
        stream,
    )


def kv_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    rows: Tensor,
    token_rows: Tensor,
    positions: Tensor,
) -> None:
    """Stores a step's keys and values in their rows' blocks.

    Args:
        k: [T, Hkv, D], tokens may be strided, likewise v.
        v: [T, Hkv, D].
        k_cache: [num_blocks, S, Hkv, D], same dtype; updated, likewise v_cache.
        v_cache: [num_blocks, S, Hkv, D].
        block_table: [max_rows, max_blocks].
        rows: [R] row ids.
        token_rows: [T] index into rows.
        positions: [T] absolute.
    """
    op = "kv_write"
    num_tokens, num_kv_heads, head_dim = k.shape
    check_shape(op, "v", v, (num_tokens, num_kv_heads, head_dim), "T, Hkv, D")
    check_inner_dense(op, "k", k)
    check_inner_dense(op, "v", v)
    check_same_dtype(op, "v", v, k.dtype)
    _check_cache(op, k_cache, v_cache, block_table, num_kv_heads, head_dim, k.dtype)
    check_index(op, "rows", rows, rows.shape[0], "R")
    check_index(op, "token_rows", token_rows, num_tokens, "T")
    check_index(op, "positions", positions, num_tokens, "T")
    kernels, stream = target_of(k)
    kernels.kv_write(
        num_tokens,
        num_kv_heads,
        head_dim,
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        positions.data_ptr(),
        token_rows.data_ptr(),
        rows.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        k_cache.stride(0),
        k_cache.shape[1],
        block_table.data_ptr(),
        block_table.stride(0),
        dtype_code(op, "k", k),
        stream,
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    rows: Tensor,
    query_start: Tensor,
    row_start: Tensor,
    max_query_len: int,
    max_kv_len: int,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of ragged query rows: query i of row r sees positions 0 .. row_start[r] + i.

    Args:
        q: [T, Hq, D], tokens may be strided; Hkv divides Hq.
        k_cache: [num_blocks, S, Hkv, D], same dtype, this step's keys included; likewise v_cache.
        v_cache: [num_blocks, S, Hkv, D].
        block_table: [max_rows, max_blocks].
        rows: [R] row ids.
        query_start: [R + 1] prefix sums of the rows' tokens.
        row_start: [R] absolute position of each row's first query.
        max_query_len: at least the longest row's number of queries.
        max_kv_len: at least the longest row's keys.
        scale: of the scores before the softmax.
        out: [T, Hq, D] contiguous.

    Returns:
        [T, Hq, D] in q's dtype.
    """
    op = "paged_attention"
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    num_rows = rows.shape[0]
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ArgumentError(f"{op}: q must have a multiple of Hkv = {num_kv_heads} heads, got {num_heads}")
    if not q.is_cpu:
        _check_gpu_limits(op, num_rows, head_dim)
    check_inner_dense(op, "q", q)
    _check_cache(op, k_cache, v_cache, block_table, num_kv_heads, head_dim, q.dtype)
    check_index(op, "rows", rows, num_rows, "R")
    check_index(op, "query_start", query_start, num_rows + 1, "R + 1")
    check_index(op, "row_start", row_start, num_rows, "R")
    result = output_like(op, out, (num_tokens, num_heads, head_dim), q)
    kernels, stream = target_of(q)
    sizes = (num_rows, num_tokens, max_query_len, max_kv_len, num_heads, num_kv_heads, head_dim)
    workspace_bytes = kernels.paged_attention_workspace_bytes(*sizes)
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=q.device) if workspace_bytes else None
    kernels.paged_attention(
        *sizes,
        query_start.data_ptr(),
        row_start.data_ptr(),
        q.data_ptr(),
        q.stride(0),
        rows.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        k_cache.stride(0),
        k_cache.shape[1],
        block_table.data_ptr(),
        block_table.stride(0),
        scale,
        0 if workspace is None else workspace.data_ptr(),
        workspace_bytes,
        result.data_ptr(),
        dtype_code(op, "q", q),
        stream,
    )
    return result


def _check_gpu_limits(op: str, num_rows: int, head_dim: int) -> None:
    if num_rows > MAX_GPU_ROWS:
        raise ArgumentError(f"{op}: rows must be at most {MAX_GPU_ROWS} on a GPU, got {num_rows}")
    if head_dim > MAX_GPU_HEAD_DIM:
        raise ArgumentError(
            f"{op}: q must have at most D = {MAX_GPU_HEAD_DIM} channels a head on a GPU, got {head_dim}"
        )


def _check_cache(
    op: str,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    num_blocks, block_size = k_cache.shape[:2]
    expected = (num_blocks, block_size, num_kv_heads, head_dim)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_shape(op, name, cache, expected, "num_blocks, S, Hkv, D")
        check_inner_dense(op, name, cache)
        check_same_dtype(op, name, cache, dtype)
    if k_cache.stride(0) != v_cache.stride(0):
        raise ArgumentError(
            f"{op}: v_cache must have k_cache's block stride {k_cache.stride(0)}, got {v_cache.stride(0)}"
        )
    check_same_dtype(op, "block_table", block_table, torch.int32)
    check_inner_dense(op, "block_table", block_table)
