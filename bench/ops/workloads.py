"""One layer's ops at the shapes of published models, built from the cases that the tests use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from headway import ops
from tests.cases import ModelShape, MoeCase, NormCase, Rows
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


def add_rms_norm(shape: ModelShape, scene: Scene) -> Work:
    count = scene.rows.num_tokens
    given = scene.build(norm_arguments(NormCase(count, shape.hidden), scene.dtype))
    residual, out = torch.zeros_like(given["x"]), torch.empty_like(given["x"])
    num_bytes = 4 * count * shape.hidden * scene.dtype.itemsize
    return Work(lambda: ops.add_rms_norm(**given, residual=residual, out=out), num_bytes)


def gated_rms_norm(shape: ModelShape, scene: Scene) -> Work:
    count, d_inner = scene.rows.num_tokens, shape.mamba.d_inner
    case = NormCase(count, d_inner, group_size=d_inner // shape.mamba.num_groups)
    given = scene.build(gated_norm_arguments(case, scene.dtype))
    return Work(lambda: ops.gated_rms_norm(**given), 3 * count * d_inner * scene.dtype.itemsize)


def causal_conv1d(shape: ModelShape, scene: Scene) -> Work:
    mamba, rows = shape.mamba, scene.rows
    given = scene.build(conv_arguments(mamba, rows, scene.dtype))
    columns = 2 * rows.num_tokens + 2 * (mamba.width - 1) * rows.num_rows + mamba.width
    return Work(lambda: ops.causal_conv1d(**given), columns * mamba.conv_dim * scene.dtype.itemsize)


def ssm_scan(shape: ModelShape, scene: Scene) -> Work:
    mamba, rows = shape.mamba, scene.rows
    given = scene.build(scan_arguments(mamba, rows, scene.dtype))
    num_reads = rows.num_rows + sum(start > 0 for start in rows.starts)
    state_bytes = 4 * num_reads * mamba.d_inner * mamba.state_size
    token_elements = (mamba.conv_dim + mamba.d_inner + mamba.num_heads) * rows.num_tokens
    return Work(lambda: ops.ssm_scan(**given), state_bytes + token_elements * scene.dtype.itemsize)


def rotary(shape: ModelShape, scene: Scene) -> Work:
    given = scene.build(rotary_arguments(shape.attention, scene.rows, scene.dtype))
    elements = 2 * _q_elements(shape, scene) + _new_kv_elements(shape, scene)
    return Work(lambda: ops.rotary(**given), elements * scene.dtype.itemsize)


def kv_write(shape: ModelShape, scene: Scene) -> Work:
    given = scene.build(kv_write_arguments(shape.attention, scene.rows, scene.dtype))
    return Work(lambda: ops.kv_write(**given), 2 * _new_kv_elements(shape, scene) * scene.dtype.itemsize)


def paged_attention(shape: ModelShape, scene: Scene) -> Work:
    case, rows = shape.attention, scene.rows
    given = scene.build(attention_arguments(case, rows, scene.dtype))
    num_keys = sum(start + length for start, length in zip(rows.starts, rows.lengths, strict=True))
    elements = 2 * _q_elements(shape, scene) + 2 * num_keys * case.num_kv_heads * case.head_dim
    return Work(lambda: ops.paged_attention(**given), elements * scene.dtype.itemsize)


def activation(shape: ModelShape, scene: Scene) -> Work:
    count = scene.rows.num_tokens
    x = normal(count, 2 * shape.intermediate, dtype=scene.dtype).to(scene.device)
    num_bytes = 3 * count * shape.intermediate * scene.dtype.itemsize
    return Work(lambda: ops.activation(x, "silu", True), num_bytes)


def route(shape: ModelShape, scene: Scene) -> Work:
    logits = normal(scene.rows.num_tokens, shape.num_experts).to(scene.device)
    return Work(lambda: ops.route(logits, shape.top_k), logits.numel() * 4)


def moe_experts(shape: ModelShape, scene: Scene) -> Work:
    count = scene.rows.num_tokens
    case = MoeCase(count, shape.hidden, shape.intermediate, shape.num_experts, shape.top_k, False, "relu2")
    given = scene.build(moe_arguments(case, scene.dtype))
    num_touched = len(given["routing"].expert_ids.unique())
    elements = 2 * num_touched * shape.hidden * shape.intermediate + 2 * count * shape.hidden
    return Work(lambda: ops.moe_experts(**given), elements * scene.dtype.itemsize)


def _q_elements(shape: ModelShape, scene: Scene) -> int:
    return scene.rows.num_tokens * shape.attention.num_heads * shape.attention.head_dim


def _new_kv_elements(shape: ModelShape, scene: Scene) -> int:
    return 2 * scene.rows.num_tokens * shape.attention.num_kv_heads * shape.attention.head_dim


LAYER_OPS = (
    add_rms_norm,
    gated_rms_norm,
    causal_conv1d,
    ssm_scan,
    rotary,
    kv_write,
    paged_attention,
    activation,
)
EXPERT_OPS = (route, moe_experts)


def builders(shape: ModelShape) -> dict[str, Callable[[ModelShape, Scene], Work]]:
    """By name, what makes each op of the model's layers: one at a time, so that only one op's tensors exist."""
    return {op.__name__: op for op in (*LAYER_OPS, *(EXPERT_OPS if shape.num_experts else ()))}
