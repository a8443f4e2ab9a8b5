"""The decode step of a mixer in one call: against the float64 oracle, and bit for bit against the three ops."""

from __future__ import annotations

import pytest
import torch

from headway import ops
from headway.ops import reference
from tests.cases import NAN, MambaCase
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import in_float64, normal, on_device

CASES = {
    "p64_g2": MambaCase(16, 64, 2, 128),
    "p80_g1": MambaCase(6, 80, 1, 128),
    "p64_n64": MambaCase(5, 64, 1, 64),
    "p128_n256": MambaCase(3, 128, 3, 256),
    "many_heads": MambaCase(40, 16, 1, 64),
    "not_fused": MambaCase(4, 24, 2, 16, width=3, has_bias=False),
}
STARTS = {"one": (9,), "fresh": (0,), "batch": (5, 0, 1, 77, 0, 3)}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_batch = pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)


def decode_arguments(case: MambaCase, starts: tuple[int, ...], dtype: torch.dtype) -> dict[str, object]:
    """z, columns and dt are slices of one tensor, as an in_proj leaves them; slots that are not read hold NaN."""
    num_rows, d_inner = len(starts), case.num_heads * case.head_dim
    width = d_inner + case.conv_dim + case.num_heads
    projected = normal(num_rows, width + -width % 8, dtype=dtype)
    read_slots = torch.arange(num_rows, 0, -1, dtype=torch.int32)
    conv_state = torch.full((2 * num_rows + 1, case.width - 1, case.conv_dim), NAN, dtype=dtype)
    ssm_state = torch.full((2 * num_rows + 1, case.num_heads, case.head_dim, case.state_size), NAN)
    for slot, start in zip(read_slots.tolist(), starts, strict=True):
        if start > 0:
            conv_state[slot] = normal(*conv_state.shape[1:], dtype=dtype, seed=10 + slot)
            ssm_state[slot] = normal(*ssm_state.shape[1:], seed=30 + slot)
    heads = torch.rand(3, case.num_heads, generator=torch.Generator().manual_seed(5))
    return {
        "z": projected[:, :d_inner],
        "columns": projected[:, d_inner : d_inner + case.conv_dim],
        "dt": projected[:, d_inner + case.conv_dim : width],
        "conv_weight": normal(case.width, case.conv_dim, dtype=dtype, seed=2, scale=0.5),
        "conv_bias": normal(case.conv_dim, dtype=dtype, seed=3) if case.has_bias else None,
        "conv_state": conv_state,
        "A": -heads[0] * 4,
        "D": heads[1],
        "dt_bias": heads[2] - 1,
        "ssm_state": ssm_state,
        "norm_weight": normal(d_inner, dtype=dtype, seed=4),
        "norm_eps": 1e-5,
        "row_start": torch.tensor(starts, dtype=torch.int32),
        "read_slots": read_slots,
        # Every other row goes on in place.
        "write_slots": read_slots + torch.tensor([num_rows * (i % 2) for i in range(num_rows)]).int(),
    }


@each_case
@each_batch
def test_against_the_oracle(case, starts, dtype, device):
    arguments = decode_arguments(case, starts, dtype)
    oracle, given = in_float64(arguments), on_device(arguments, device)
    expected, actual = reference.mamba_decode_ref(**oracle), ops.mamba_decode(**given)
    error = (actual.cpu().double() - expected).norm() / expected.norm()
    assert error < (
        1e-5 if dtype == torch.float32 else 3e-2
    )  # in bf16 all three ops round, and the norm magnifies
    slots = arguments["write_slots"].long()
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    assert_close(given["ssm_state"][slots], oracle["ssm_state"][slots], "state", tolerance=tolerance)
    assert_bit_equal(given["conv_state"][slots], oracle["conv_state"][slots].to(dtype), "conv state")


@each_case
@each_batch
def test_equals_the_three_ops(case, starts, dtype, device):
    given = on_device(decode_arguments(case, starts, dtype), device)
    chained = {**given, **{name: given[name].clone() for name in ("conv_state", "ssm_state")}}
    out, expected = ops.mamba_decode(**given), three_ops(case, **chained)
    assert_bit_equal(given["ssm_state"], chained["ssm_state"], "state")
    assert_bit_equal(given["conv_state"], chained["conv_state"], "conv state")
    assert_close(out, expected, "out", tolerance=1e-6 if dtype == torch.float32 else None)


@each_case
def test_batch_mates_change_nothing(case, dtype, device):
    """A row alone is spread over more blocks than a row among many."""
    starts = (4,) * 150
    arguments = on_device(decode_arguments(case, starts, dtype), device)
    alone = {**arguments, **{name: arguments[name].clone() for name in ("conv_state", "ssm_state")}}
    out = ops.mamba_decode(**arguments)
    for row in (0, 77, 149):
        rows = ("z", "columns", "dt", "row_start", "read_slots", "write_slots")
        mine = {name: arguments[name][row : row + 1] for name in rows}
        assert_bit_equal(ops.mamba_decode(**{**alone, **mine}), out[row : row + 1], f"row {row}")


def three_ops(case, z, columns, dt, conv_weight, conv_bias, conv_state, A, D, dt_bias, ssm_state, **rest):
    query_start = torch.arange(len(z) + 1, dtype=torch.int32, device=z.device)
    rows = (query_start, rest["row_start"], rest["read_slots"], rest["write_slots"])
    d_inner, states = case.num_heads * case.head_dim, case.num_groups * case.state_size
    convolved = ops.causal_conv1d(columns, conv_weight, conv_bias, conv_state, *rows)
    x, B, C = convolved.split([d_inner, states, states], dim=1)
    heads, groups = (case.num_heads, case.head_dim), (case.num_groups, case.state_size)
    mixed = (x.unflatten(1, heads), B.unflatten(1, groups), C.unflatten(1, groups), dt)
    y = ops.ssm_scan(*mixed, A, D, dt_bias, ssm_state, *rows, max_query_len=1)
    group_size = d_inner // case.num_groups
    return ops.gated_rms_norm(y.flatten(1), z, rest["norm_weight"], rest["norm_eps"], group_size)
