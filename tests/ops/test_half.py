"""Models in float16 on a GPU: every op against the oracle, poisoned and ragged as in the other types' tests."""

from __future__ import annotations

import pytest
import torch

from headway import ops
from headway.ops import reference
from tests.cases import ATTENTION_CASES, MAMBA_CASES, MOE_CASES, NORM_CASES, ROWS, MambaCase, Rows
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import (
    attention_arguments,
    conv_arguments,
    gated_norm_arguments,
    in_float64,
    kv_write_arguments,
    moe_arguments,
    norm_arguments,
    normal,
    on_device,
    rotary_arguments,
    scan_arguments,
)
from tests.ops.slot_windows import Inputs, WindowedRows

pytestmark = pytest.mark.gpu

HALF = torch.float16
RAGGED = {name: ROWS[name] for name in ("mixed", "empty_rows", "no_tokens")} | {
    "prompt": Rows((130, 1), (64, 7))
}
each_rows = pytest.mark.parametrize("rows", RAGGED.values(), ids=RAGGED)


@pytest.mark.parametrize("case", NORM_CASES.values(), ids=NORM_CASES)
def test_norms(case):
    arguments = norm_arguments(case, HALF)
    expected = reference.rms_norm_ref(**in_float64(arguments))
    assert_close(ops.rms_norm(**on_device(arguments, "cuda")), expected, "rms_norm")
    arguments["residual"] = normal(case.num_tokens, case.hidden, dtype=HALF, seed=5)
    given = on_device(arguments, "cuda")
    normed = ops.add_rms_norm(**given, residual_scale=0.22)
    stored = given["residual"].cpu().double()
    assert_close(
        given["residual"], arguments["residual"].double() + 0.22 * arguments["x"].double(), "residual"
    )
    weight, eps = arguments["weight"].double(), arguments["eps"]
    assert_close(normed, reference.rms_norm_ref(stored, weight, eps), "add_rms_norm")
    arguments = gated_norm_arguments(case, HALF)
    expected = reference.gated_rms_norm_ref(**in_float64(arguments))
    assert_close(ops.gated_rms_norm(**on_device(arguments, "cuda")), expected, "gated_rms_norm")


@each_rows
@pytest.mark.parametrize("case", MAMBA_CASES.values(), ids=MAMBA_CASES)
def test_convolution_and_scan(case, rows):
    for name, op, ref, build in (
        ("conv", ops.causal_conv1d, reference.causal_conv1d_ref, conv_arguments),
        ("scan", ops.ssm_scan, reference.ssm_scan_ref, scan_arguments),
    ):
        arguments = build(case, rows, HALF)
        oracle, given = in_float64(arguments), on_device(arguments, "cuda")
        expected = ref(**oracle)
        assert_close(op(**given), expected, name)
        slots = arguments["write_slots"].long()
        state = given["state"].cpu()
        assert_close(state[slots], oracle["state"][slots], f"{name} state", tolerance=1e-5)
        others = [slot for slot in range(len(state)) if slot not in slots.tolist()]
        assert_bit_equal(state[others], arguments["state"][others], f"{name}: slots of nobody")


@each_rows
@pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES)
def test_attention(case, rows):
    arguments = rotary_arguments(case, rows, HALF)
    oracle, given = in_float64(arguments), on_device(arguments, "cuda")
    reference.rotary_ref(**oracle)
    ops.rotary(**given)
    for name in ("q", "k"):
        assert_close(given[name], oracle[name], f"rotary {name}")
    arguments = kv_write_arguments(case, rows, HALF)
    expected, given = on_device(arguments, "cpu"), on_device(arguments, "cuda")
    reference.kv_write_ref(**expected)
    ops.kv_write(**given)
    for name in ("k_cache", "v_cache"):
        assert_bit_equal(given[name], expected[name], name)
    arguments = attention_arguments(case, rows, HALF)
    expected = reference.paged_attention_ref(**in_float64(arguments))
    assert_close(ops.paged_attention(**on_device(arguments, "cuda")), expected, "paged_attention")


@pytest.mark.parametrize("kind", ["silu", "relu2", "gelu"])
@pytest.mark.parametrize("is_gated", [False, True])
def test_activation(kind, is_gated):
    x = normal(7, 2 * 31, dtype=HALF, scale=3.0)
    expected = reference.activation_ref(x.double(), kind, is_gated)
    assert_close(ops.activation(x.cuda(), kind, is_gated), expected, kind)


@pytest.mark.parametrize("case", MOE_CASES.values(), ids=MOE_CASES)
def test_experts(case):
    arguments = moe_arguments(case, HALF)
    expected = reference.moe_experts_ref(**in_float64(arguments))
    tolerance = 3 * 2.0**-11  # products round on their way
    assert_close(
        ops.moe_experts(**on_device(arguments, "cuda")), expected, "moe_experts", tolerance=tolerance
    )


@pytest.mark.parametrize("ssm_dtype", [torch.float32, HALF], ids=["state32", "state16"])
@pytest.mark.parametrize("case", [MambaCase(4, 64, 2, 128), MambaCase(3, 80, 1, 256)], ids=["p64", "p80"])
def test_windowed_decode(case, ssm_dtype):
    """Ragged rows of their own phases, some of whose tokens are taken back."""
    origins = [1, 3, 15, 40]
    rows = WindowedRows(case, origins, HALF, "cuda", max_rewind=3, ssm_dtype=ssm_dtype)
    oracle = rows.oracle()
    inputs = Inputs.draw(case, len(origins), 96, HALF, "cuda")
    for step in range(14):
        counts = [1 + (step + row) % 4 for row in range(len(origins))]
        actual, expected = rows.step(inputs, counts), oracle.step(inputs.in_float64(), counts)
        error = (actual.cpu().double() - expected).norm() / expected.norm()
        assert error < (2e-3 if ssm_dtype == torch.float32 else 6e-3), f"step {step}"
        if step % 3 == 2:
            rows.rewind(step % 4)
            oracle.rewind(step % 4)
