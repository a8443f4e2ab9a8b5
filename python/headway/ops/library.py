"""The ops as `torch.ops.headway.*`, for users and for torch.compile. Importing this module registers them.

The engine's layers call the thin functions instead, which cost a fraction of a dispatcher call. Left out are
begin_step, sample and finish_step: they act on the engine's fixed buffers and on host addresses, which a traced
program has not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from headway.errors import ArgumentError
from headway.ops.attention import kv_write, paged_attention, rotary
from headway.ops.mamba import causal_conv1d, ssm_scan
from headway.ops.moe import moe_experts
from headway.ops.norm import add_rms_norm, gated_rms_norm, rms_norm
from headway.ops.pointwise import activation
from headway.ops.records import ActivationKind, Routing, ScoreKind, Snapshots
from headway.ops.routing import route

_ROWS: Final = "Tensor query_start, Tensor row_start, Tensor read_slots, Tensor write_slots"
_SNAPSHOTS: Final = "Tensor? snapshot_starts, Tensor? snapshot_positions, Tensor? snapshot_slots"
_CACHE: Final = "Tensor block_table, Tensor rows"

SCHEMAS: Final[dict[str, str]] = {
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm": "(Tensor x, Tensor(a!) residual, Tensor weight, float eps, float residual_scale) -> Tensor",
    "gated_rms_norm": "(Tensor y, Tensor z, Tensor weight, float eps, int group_size) -> Tensor",
    "causal_conv1d": f"(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, {_ROWS}, "
    f"{_SNAPSHOTS}) -> Tensor",
    "ssm_scan": "(Tensor x, Tensor B, Tensor C, Tensor dt, Tensor A, Tensor D, Tensor dt_bias, Tensor(a!) state, "
    f"{_ROWS}, float dt_min, float dt_max, {_SNAPSHOTS}) -> Tensor",
    "rotary": "(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor cos_sin) -> ()",
    "kv_write": "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    f"{_CACHE}, Tensor token_rows, Tensor positions) -> ()",
    "paged_attention": f"(Tensor q, Tensor k_cache, Tensor v_cache, {_CACHE}, Tensor query_start, "
    "Tensor row_start, int max_query_len, int max_kv_len, float scale) -> Tensor",
    "activation": "(Tensor x, str kind, bool is_gated) -> Tensor",
    "route": "(Tensor logits, int top_k, str score, Tensor? bias, bool normalise, float scale, int num_groups, "
    "int topk_group) -> (Tensor weights, Tensor expert_ids)",
    "moe_experts": "(Tensor x, Tensor weights, Tensor expert_ids, Tensor w_in, Tensor w_out, str activation, "
    "bool is_gated) -> Tensor",
}


def _route(
    logits: Tensor,
    top_k: int,
    score: ScoreKind,
    bias: Tensor | None,
    normalise: bool,
    scale: float,
    num_groups: int,
    topk_group: int,
) -> tuple[Tensor, Tensor]:
    weights, expert_ids = route(
        logits,
        top_k,
        score=score,
        bias=bias,
        normalise=normalise,
        scale=scale,
        num_groups=num_groups,
        topk_group=topk_group,
    )
    return weights, expert_ids


def _moe_experts(
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: ActivationKind,
    is_gated: bool,
) -> Tensor:
    return moe_experts(x, Routing(weights, expert_ids), w_in, w_out, activation, is_gated)


def _with_snapshots(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op with the three tensors of `Snapshots` as its last arguments; all or none of them are given."""

    def flat(*arguments: object) -> Tensor:
        *others, starts, positions, slots = arguments
        if isinstance(starts, Tensor) and isinstance(positions, Tensor) and isinstance(slots, Tensor):
            return op(*others, snapshots=Snapshots(starts, positions, slots))
        if starts is None and positions is None and slots is None:
            return op(*others)
        raise ArgumentError(
            f"{op.__name__}: of the snapshots' starts, positions and slots all or none must be given"
        )

    return flat


KERNELS: Final[dict[str, Callable[..., object]]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "gated_rms_norm": gated_rms_norm,
    "causal_conv1d": _with_snapshots(causal_conv1d),
    "ssm_scan": _with_snapshots(ssm_scan),
    "rotary": rotary,
    "kv_write": kv_write,
    "paged_attention": paged_attention,
    "activation": activation,
    "route": _route,
    "moe_experts": _moe_experts,
}


def _like_first(first: Tensor, *_: object) -> Tensor:
    """A contiguous tensor of the first argument's shape: what most ops return."""
    return first.new_empty(first.shape)


def _nothing(*_: object) -> None:
    """The fake of an op that only writes in place."""


def _fake_activation(x: Tensor, kind: str, is_gated: bool) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2 if is_gated else x.shape[1]))


def _fake_route(logits: Tensor, top_k: int, *_: object) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32)


_FAKES: Final[dict[str, Callable[..., object]]] = {
    "rotary": _nothing,
    "kv_write": _nothing,
    "activation": _fake_activation,
    "route": _fake_route,
}


def _on_one_device(name: str, kernel: Callable[..., object]) -> Callable[..., object]:
    """The kernel behind a look at where its tensors are: it takes an address for one of its own device's.

    The engine's tensors come from one place, so the thin functions do not look.
    """
    parameters = [argument.name for argument in torch._C.parse_schema(name + SCHEMAS[name]).arguments]

    def checked(*arguments: object) -> object:
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        for parameter, argument in zip(parameters, arguments, strict=False):
            if isinstance(argument, Tensor) and argument.device != device:
                raise ArgumentError(
                    f"{name}: {parameter} must be on {device} as the others, got {argument.device}"
                )
        return kernel(*arguments)

    return checked


def _register() -> torch.library.Library:
    """Defines every op; torch forgets them when the returned object dies."""
    library = torch.library.Library("headway", "DEF")  # type: ignore[no-untyped-call]
    for name, schema in SCHEMAS.items():
        library.define(name + schema)  # type: ignore[no-untyped-call]
        kernel = _on_one_device(name, KERNELS[name])
        library.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"headway::{name}", _FAKES.get(name, _like_first), lib=library)
    return library


_LIBRARY: Final = _register()
