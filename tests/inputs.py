"""Tensors for the cases of tests/cases.py. Everything is drawn on the CPU, so every device gets the same values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headway.ops import Routing, Snapshots
from tests.cases import NAN, AttentionCase, MambaCase, MoeCase, NormCase, RouteCase, Rows

Arguments = dict[str, Any]


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator(seed)) * scale).to(dtype)


def with_gaps(tensor: Tensor, gap: int) -> Tensor:
    """The same values with gap elements of NaN between the first dimension's entries."""
    size = tensor[0].numel() if tensor.shape[0] else 0
    if gap == 0 or size == 0:
        return tensor
    buffer = torch.full((tensor.shape[0], size + gap), NAN, dtype=tensor.dtype)
    view = buffer.as_strided(tensor.shape, (size + gap, *tensor.stride()[1:]))
    view.copy_(tensor)
    return view


def transform(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """change of every tensor in a nest of dictionaries and records."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: transform(entry, change) for key, entry in value.items()}
    if isinstance(value, (Routing, Snapshots)):
        return type(value)(*(change(tensor) for tensor in value))
    return value


def on_device(arguments: Arguments, device: str) -> Arguments:
    """Copies that keep strides and share nothing."""

    def move(tensor: Tensor) -> Tensor:
        size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel() == 0:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        storage = tensor.as_strided((size,), (1,)).clone().to(device)
        return storage.as_strided(tensor.shape, tensor.stride())

    return dict(transform(arguments, move))


def in_float64(arguments: Arguments) -> Arguments:
    """The oracle's arguments: contiguous CPU copies, floats in float64."""

    def widen(tensor: Tensor) -> Tensor:
        copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return copy.double() if copy.is_floating_point() else copy

    return dict(transform(arguments, widen))


def norm_arguments(case: NormCase, dtype: torch.dtype) -> Arguments:
    x = normal(case.num_tokens, case.hidden, dtype=dtype)
    return {"x": with_gaps(x, case.gap), "weight": normal(case.hidden, dtype=dtype, seed=2), "eps": 1e-5}


def gated_norm_arguments(case: NormCase, dtype: torch.dtype) -> Arguments:
    z = normal(case.num_tokens, case.hidden, dtype=dtype, seed=3, scale=3.0)
    return {
        "y": normal(case.num_tokens, case.hidden, dtype=dtype),
        "z": with_gaps(z, case.gap),
        "weight": normal(case.hidden, dtype=dtype, seed=2),
        "eps": 1e-5,
        "group_size": case.group_size or case.hidden,
    }


def row_arguments(rows: Rows) -> Arguments:
    """query_start, row_start, and slots in an order of their own; slot 0 is nobody's."""
    slots = torch.arange(rows.num_rows, 0, -1, dtype=torch.int32)
    return {
        "query_start": torch.tensor([0, *torch.tensor(rows.lengths).cumsum(0).tolist()], dtype=torch.int32),
        "row_start": torch.tensor(rows.starts, dtype=torch.int32),
        "read_slots": slots,
        "write_slots": slots.clone(),
    }


def _poison_slots(state: Tensor, rows: Rows, slots: Tensor) -> Tensor:
    """NaN in the slots that must not be read: of fresh rows, and of nobody."""
    kept = [int(slot) for slot, start in zip(slots, rows.starts, strict=True) if start > 0]
    poisoned = torch.full_like(state, NAN)
    poisoned[kept] = state[kept]
    return poisoned


def conv_arguments(case: MambaCase, rows: Rows, dtype: torch.dtype) -> Arguments:
    shared = row_arguments(rows)
    state = normal(rows.num_rows + 2, case.width - 1, case.conv_dim, dtype=dtype, seed=4)
    x = normal(rows.num_tokens, case.conv_dim, dtype=dtype)
    return {
        "x": with_gaps(x, case.gap),
        "weight": normal(case.width, case.conv_dim, dtype=dtype, seed=2, scale=0.5),
        "bias": normal(case.conv_dim, dtype=dtype, seed=3) if case.has_bias else None,
        "state": _poison_slots(state, rows, shared["read_slots"]),
        **shared,
    }


def scan_arguments(case: MambaCase, rows: Rows, dtype: torch.dtype) -> Arguments:
    heads, groups, count = case.num_heads, case.num_groups, rows.num_tokens
    shared = row_arguments(rows)
    state = normal(rows.num_rows + 2, heads, case.head_dim, case.state_size, seed=8)

    def tokens(*shape: int, seed: int) -> Tensor:
        return with_gaps(normal(count, *shape, dtype=dtype, seed=seed), case.gap)

    return {
        "x": tokens(heads, case.head_dim, seed=1),
        "B": tokens(groups, case.state_size, seed=2),
        "C": tokens(groups, case.state_size, seed=3),
        "dt": tokens(heads, seed=4),
        "A": -torch.rand(heads, generator=generator(5)) * 4,
        "D": normal(heads, seed=6),
        "dt_bias": normal(heads, seed=7),
        "state": _poison_slots(state, rows, shared["read_slots"]),
        **shared,
        "dt_max": case.dt_max,
    }


def cache_arguments(case: AttentionCase, rows: Rows, dtype: torch.dtype) -> Arguments:
    """Rows with shuffled ids and blocks; everything no row may see is NaN."""
    num_blocks = [-(-(s + n) // case.block_size) for s, n in zip(rows.starts, rows.lengths, strict=True)]
    ids = torch.randperm(rows.num_rows, generator=generator(9)) + 1
    blocks = torch.randperm(sum(num_blocks), generator=generator(10)) + 1
    table = torch.zeros(rows.num_rows + 1, max(num_blocks, default=0) + 1, dtype=torch.int32)
    shape = (sum(num_blocks) + 2, case.block_size, case.num_kv_heads, case.head_dim)
    keys, values = torch.full(shape, NAN, dtype=dtype), torch.full(shape, NAN, dtype=dtype)
    begin = 0
    for index, count in enumerate(num_blocks):
        mine = blocks[begin : begin + count]
        table[ids[index], :count] = mine.int()
        begin += count
        kv_len = rows.starts[index] + rows.lengths[index]
        for seed, cache in ((11, keys), (12, values)):
            fresh = normal(count * case.block_size, *shape[2:], dtype=dtype, seed=seed + index * 2)
            fresh[kv_len:] = NAN
            cache[mine] = fresh.view(count, *shape[1:])
    return {"k_cache": keys, "v_cache": values, "block_table": table, "rows": ids.int()}


def attention_arguments(case: AttentionCase, rows: Rows, dtype: torch.dtype) -> Arguments:
    shared = row_arguments(rows)
    q = normal(rows.num_tokens, case.num_heads, case.head_dim, dtype=dtype)
    return {
        "q": with_gaps(q, case.gap),
        **cache_arguments(case, rows, dtype),
        "query_start": shared["query_start"],
        "row_start": shared["row_start"],
        "max_query_len": rows.max_query_len,
        "max_kv_len": rows.max_kv_len,
        "scale": case.head_dim**-0.5,
    }


def token_arguments(rows: Rows) -> Arguments:
    """positions [T] and token_rows [T]."""
    positions = [p for s, n in zip(rows.starts, rows.lengths, strict=True) for p in range(s, s + n)]
    token_rows = [index for index, n in enumerate(rows.lengths) for _ in range(n)]
    return {
        "positions": torch.tensor(positions, dtype=torch.int32),
        "token_rows": torch.tensor(token_rows, dtype=torch.int32),
    }


def kv_write_arguments(case: AttentionCase, rows: Rows, dtype: torch.dtype) -> Arguments:
    shape = (rows.num_tokens, case.num_kv_heads, case.head_dim)
    return {
        "k": with_gaps(normal(*shape, dtype=dtype), case.gap),
        "v": with_gaps(normal(*shape, dtype=dtype, seed=2), case.gap),
        **cache_arguments(case, rows, dtype),
        **token_arguments(rows),
    }


def rotary_arguments(case: AttentionCase, rows: Rows, dtype: torch.dtype) -> Arguments:
    rotary_dim = case.rotary_dim or case.head_dim
    half = rotary_dim // 2
    angles = torch.arange(rows.max_kv_len + 1)[:, None] * 100.0 ** -(torch.arange(half) / half)
    return {
        "q": with_gaps(normal(rows.num_tokens, case.num_heads, case.head_dim, dtype=dtype), case.gap),
        "k": with_gaps(
            normal(rows.num_tokens, case.num_kv_heads, case.head_dim, dtype=dtype, seed=2), case.gap
        ),
        "positions": token_arguments(rows)["positions"],
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1).contiguous(),
    }


def route_arguments(case: RouteCase) -> Arguments:
    logits = normal(case.num_tokens, case.num_experts, scale=2.0)
    bias = normal(case.num_experts, seed=2, scale=0.3) if case.has_bias else None
    logits = logits.round() if case.is_tied else logits
    return {"logits": logits, "top_k": case.top_k, "bias": bias, **case.options}


def moe_arguments(case: MoeCase, dtype: torch.dtype) -> Arguments:
    columns = 2 * case.width if case.is_gated else case.width
    ids = [
        torch.randperm(case.num_experts, generator=generator(i))[: case.top_k] for i in range(case.num_tokens)
    ]
    expert_ids = torch.stack(ids).int() if ids else torch.zeros(0, case.top_k, dtype=torch.int32)
    weights = torch.rand(case.num_tokens, case.top_k, generator=generator(4))
    return {
        "x": normal(case.num_tokens, case.hidden, dtype=dtype),
        "routing": Routing(weights, expert_ids),
        "w_in": normal(case.num_experts, columns, case.hidden, dtype=dtype, seed=2, scale=case.hidden**-0.5),
        "w_out": normal(
            case.num_experts, case.hidden, case.width, dtype=dtype, seed=3, scale=case.width**-0.5
        ),
        "activation": case.activation,
        "is_gated": case.is_gated,
    }
