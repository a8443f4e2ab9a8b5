"""One layer's ops at the shapes of published models, built from the cases that the tests use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from headway import ops
from tests.cases import AttentionCase, ModelShape, MoeCase, NormCase, Rows
from tests.inputs import (
    attention_arguments,
    conv_arguments,
    gated_norm_arguments,
    kv_write_arguments,
    moe_arguments,
    norm_arguments,
    normal,
    on_device,
    rotary_arguments,
    scan_arguments,
)


@dataclass(frozen=True)
class Work:
    """One op on one shape; num_bytes counts each input and output once."""

    name: str
    run: Callable[[], object]
    num_bytes: float


@dataclass(frozen=True)
class Scene:
    """The rows of a step, on a device, in a dtype."""

    title: str
    rows: Rows
    dtype: torch.dtype
    device: str

    def build(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return on_device(arguments, self.device)


def works(shape: ModelShape, scene: Scene) -> Iterator[Work]:
    """Every op of the model's layers, one at a time, so that only one op's tensors exist."""
    yield from _norms(shape, scene)
    yield from _mamba(shape, scene)
    yield from _attention(shape.attention, scene)
    yield from _mlp(shape, scene)


def _norms(shape: ModelShape, scene: Scene) -> Iterator[Work]:
    count, size, d_inner = scene.rows.num_tokens, scene.dtype.itemsize, shape.mamba.d_inner
    given = scene.build(norm_arguments(NormCase(count, shape.hidden), scene.dtype))
    residual, out = torch.zeros_like(given["x"]), torch.empty_like(given["x"])
    yield Work(
        "add_rms_norm",
        lambda: ops.add_rms_norm(**given, residual=residual, out=out),
        4 * count * shape.hidden * size,
    )
    group_size = d_inner // shape.mamba.num_groups
    gated = scene.build(gated_norm_arguments(NormCase(count, d_inner, group_size=group_size), scene.dtype))
    yield Work("gated_rms_norm", lambda: ops.gated_rms_norm(**gated), 3 * count * d_inner * size)


def _mamba(shape: ModelShape, scene: Scene) -> Iterator[Work]:
    mamba, rows, size = shape.mamba, scene.rows, scene.dtype.itemsize
    conv = scene.build(conv_arguments(mamba, rows, scene.dtype))
    columns = 2 * rows.num_tokens + 2 * (mamba.width - 1) * rows.num_rows + mamba.width
    yield Work("causal_conv1d", lambda: ops.causal_conv1d(**conv), columns * mamba.conv_dim * size)
    scan = scene.build(scan_arguments(mamba, rows, scene.dtype))
    num_reads = rows.num_rows + sum(start > 0 for start in rows.starts)
    state_bytes = 4 * num_reads * mamba.d_inner * mamba.state_size
    token_bytes = (mamba.conv_dim + mamba.d_inner + mamba.num_heads) * rows.num_tokens * size
    yield Work("ssm_scan", lambda: ops.ssm_scan(**scan), state_bytes + token_bytes)


def _attention(case: AttentionCase, scene: Scene) -> Iterator[Work]:
    rows, size = scene.rows, scene.dtype.itemsize
    q_elements = rows.num_tokens * case.num_heads * case.head_dim
    kv_elements = 2 * rows.num_tokens * case.num_kv_heads * case.head_dim
    rotary = scene.build(rotary_arguments(case, rows, scene.dtype))
    yield Work("rotary", lambda: ops.rotary(**rotary), (2 * q_elements + kv_elements) * size)
    write = scene.build(kv_write_arguments(case, rows, scene.dtype))
    yield Work("kv_write", lambda: ops.kv_write(**write), 2 * kv_elements * size)
    attention = scene.build(attention_arguments(case, rows, scene.dtype))
    num_keys = sum(start + length for start, length in zip(rows.starts, rows.lengths, strict=True))
    cache_elements = 2 * num_keys * case.num_kv_heads * case.head_dim
    yield Work(
        "paged_attention",
        lambda: ops.paged_attention(**attention),
        (2 * q_elements + cache_elements) * size,
    )


def _mlp(shape: ModelShape, scene: Scene) -> Iterator[Work]:
    count, size = scene.rows.num_tokens, scene.dtype.itemsize
    x = normal(count, 2 * shape.intermediate, dtype=scene.dtype).to(scene.device)
    yield Work("activation", lambda: ops.activation(x, "silu", True), 3 * count * shape.intermediate * size)
    if shape.num_experts == 0:
        return
    logits = normal(count, shape.num_experts).to(scene.device)
    yield Work("route", lambda: ops.route(logits, shape.top_k), logits.numel() * 4)
    case = MoeCase(count, shape.hidden, shape.intermediate, shape.num_experts, shape.top_k, False, "relu2")
    moe = scene.build(moe_arguments(case, scene.dtype))
    num_touched = len(moe["routing"].expert_ids.unique())
    weight_elements = 2 * num_touched * shape.hidden * shape.intermediate
    yield Work(
        "moe_experts",
        lambda: ops.moe_experts(**moe),
        (weight_elements + 2 * count * shape.hidden) * size,
    )
