"""torch.ops.headway.*: what torch itself checks of a custom op, and a compiled program that calls them."""

from __future__ import annotations

import pytest
import torch

from headway import ops
from headway.errors import ArgumentError
from headway.ops import library
from tests.cases import ATTENTION_CASES, MAMBA_CASES, MOE_CASES, NORM_CASES, ROUTE_CASES, ROWS
from tests.compare import assert_bit_equal
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
    route_arguments,
    scan_arguments,
)

F32 = torch.float32
ROUTE_DEFAULTS = {"score": "softmax", "normalise": True, "scale": 1.0, "num_groups": 1, "topk_group": 1}


def arguments_of(name: str) -> dict[str, object]:
    norm, rows = NORM_CASES["regular"], ROWS["mixed"]
    mamba, attention = MAMBA_CASES["regular"], ATTENTION_CASES["regular"]
    if name == "moe_experts":
        arguments = moe_arguments(MOE_CASES["gated"], F32)
        routing = arguments.pop("routing")
        return {"weights": routing.weights, "expert_ids": routing.expert_ids, **arguments}
    builders = {
        "rms_norm": lambda: norm_arguments(norm, F32),
        "add_rms_norm": lambda: (
            norm_arguments(norm, F32) | {"residual": normal(5, 128, seed=5), "residual_scale": 0.5}
        ),
        "gated_rms_norm": lambda: gated_norm_arguments(norm, F32),
        "causal_conv1d": lambda: finite(conv_arguments(mamba, rows, F32)) | snapshots(),
        "ssm_scan": lambda: finite(scan_arguments(mamba, rows, F32)) | {"dt_min": 0.0} | snapshots(),
        "rotary": lambda: rotary_arguments(attention, rows, F32),
        "kv_write": lambda: finite(kv_write_arguments(attention, rows, F32)),
        "paged_attention": lambda: finite(attention_arguments(attention, rows, F32)),
        "activation": lambda: {"x": normal(5, 64), "kind": "silu", "is_gated": True},
        "route": lambda: ROUTE_DEFAULTS | route_arguments(ROUTE_CASES["sigmoid"]),
    }
    return builders[name]()


def snapshots() -> dict[str, torch.Tensor]:
    """Of the third of the five mixed rows, after 16 of its tokens, in the slot that no row has."""
    lists = {"snapshot_starts": [0, 0, 0, 1, 1, 1], "snapshot_positions": [16], "snapshot_slots": [6]}
    return {name: torch.tensor(values, dtype=torch.int32) for name, values in lists.items()}


def finite(arguments: dict[str, object]) -> dict[str, object]:
    """Without poison: torch's checks compare whole caches, and NaN is not equal to NaN."""
    return {k: torch.nan_to_num(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("name", library.SCHEMAS)
@pytest.mark.filterwarnings("ignore")  # torch's own deprecations while it traces
def test_opcheck(name, device):
    torch.library.opcheck(getattr(torch.ops.headway, name).default, (), on_device(arguments_of(name), device))


def test_a_compiled_program_gives_the_same(device):
    """Traced and functionalised, run eagerly: no compiler is needed."""

    def layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = torch.ops.headway.add_rms_norm(x, residual, weight, 1e-5, 0.5)
        return torch.ops.headway.activation(normed + 1.0, "relu2", False) * residual

    x, weight = normal(5, 128).to(device), normal(128, seed=2).to(device)
    residual, again = (normal(5, 128, seed=3).to(device) for _ in range(2))
    expected = layer(x, residual, weight)
    actual = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, again, weight)
    assert_bit_equal(actual, expected, "compiled")
    assert_bit_equal(again, residual, "residual")


def test_the_registered_op_is_the_thin_function(device):
    given = on_device(gated_norm_arguments(NORM_CASES["strided"], F32), device)
    assert_bit_equal(torch.ops.headway.gated_rms_norm(**given), ops.gated_rms_norm(**given), "gated_rms_norm")


@pytest.mark.gpu
def test_a_tensor_on_another_device_is_named():
    """And the device is none the worse for it."""
    x, weight = torch.ones(2, 64, device="cuda"), torch.ones(64)
    with pytest.raises(ArgumentError, match="rms_norm: weight must be on cuda:0 as the others, got cpu"):
        torch.ops.headway.rms_norm(x, weight, 1e-5)
    good = arguments_of("causal_conv1d")
    mixed = on_device(good, "cuda") | {"read_slots": good["read_slots"]}
    with pytest.raises(ArgumentError, match="causal_conv1d: read_slots must be on cuda:0"):
        torch.ops.headway.causal_conv1d(**mixed)
    assert bool((torch.ops.headway.rms_norm(x, weight.cuda(), 0.0) == 1).all())
