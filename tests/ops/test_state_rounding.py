"""States in float16: rounded at random by position and place, the mean kept; the scan and the windowed decode step."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from headway import ops
from headway.ops.layout import STATE_COPY
from headway.ops.mamba import scan_grid_tokens
from headway.ops.reference.state_rounding import round_state_ref
from tests.cases import MambaCase
from tests.compare import assert_bit_equal
from tests.ops.slot_windows import WINDOW, Inputs, WindowedRows, mixer_weights, walk

CASES = {
    "p64_n128": MambaCase(4, 64, 2, 128),
    "p80_n64": MambaCase(3, 80, 1, 64),
    "odd": MambaCase(2, 24, 1, 40),
    "n256": MambaCase(2, 32, 1, 256),
}
WINDOWED = {
    "p64_g2": MambaCase(4, 64, 2, 128),
    "p16": MambaCase(20, 16, 1, 64),
    "n256": MambaCase(3, 128, 3, 256),
}


def test_rounding_keeps_the_mean():
    """Of values of every size, the smallest included: over 1,024 positions within five standard errors."""
    num_positions = 1024
    values = torch.tensor([1.0 + 2**-12, 0.7, -3.1e-3, 6.2e-5, -5.9e-5, 2.1e-7, -3e-9, 300.3, -65503.0])
    state = values.repeat(64).view(1, 64, len(values))
    total = sum(round_state_ref(state, p).double() for p in range(num_positions))
    mean = (total / num_positions).view(64, len(values)).mean(0)
    half = values.half().double()
    step = torch.where(half.abs() < 2.0**-14, 2.0**-24, 2.0 ** (half.abs().log2().floor() - 10))
    standard_error = step / 2 / (64 * num_positions) ** 0.5
    assert ((mean - values.double()).abs() < 5 * standard_error + 1e-12).all()


def test_rounding_leaves_what_fits_and_keeps_the_sign_of_zero():
    every_half = torch.arange(-32768, 32768).to(torch.int16).view(torch.float16)
    finite = every_half[every_half.isfinite()]
    state = finite.float().view(1, -1, 8)
    for position in (0, 1, 77, 2**31 - 1):
        rounded = round_state_ref(state, position)
        assert torch.equal(rounded.view(torch.int16), finite.view(1, -1, 8).view(torch.int16))
    edges = torch.tensor([[[65519.0, 1e30, -torch.inf, torch.nan]]])
    assert round_state_ref(edges, 3).tolist()[0][0][:3] == [65504, 65504, -65504]
    assert round_state_ref(edges, 3)[0, 0, 3].isnan()


def scan(inputs: dict[str, Tensor], state: Tensor, start: int, tokens: slice) -> Tensor:
    """One row's tokens over slot 1."""
    count = tokens.stop - tokens.start
    index = [torch.tensor(v, dtype=torch.int32, device=state.device) for v in ([0, count], [start], [1], [1])]
    moving = [inputs[name][tokens] for name in ("x", "B", "C", "dt")]
    return ops.ssm_scan(*moving, inputs["A"], inputs["D"], inputs["dt_bias"], state, *index)


def scan_inputs(case: MambaCase, length: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    drawn = Inputs.draw(case, 1, length, dtype, device)
    states = case.num_groups * case.state_size
    x, B, C = torch.split(drawn.columns[0] * 0.5, [case.d_inner, states, states], dim=1)
    weights = mixer_weights(case, dtype, device)
    return {
        "x": x.unflatten(1, (case.num_heads, case.head_dim)),
        "B": B.unflatten(1, (case.num_groups, case.state_size)),
        "C": C.unflatten(1, (case.num_groups, case.state_size)),
        "dt": drawn.dt[0],
        "A": weights.A,
        "D": weights.D,
        "dt_bias": weights.dt_bias,
    }


def empty_states(case: MambaCase, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(
        (3, case.num_heads, case.head_dim, case.state_size), torch.nan, dtype=dtype, device=device
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_scan_rounds_after_every_token(case, dtype, device):
    """Bit for bit what one-token scans over float32 give, rounded by the reference in between; cut anywhere. (On a GPU
    longer pieces of bfloat16 prompts run in chunks.)"""
    length = 37
    inputs = scan_inputs(case, length, dtype, device)
    wide = empty_states(case, torch.float32, device)
    parts = []
    for token in range(length):
        parts.append(scan(inputs, wide, token, slice(token, token + 1)))
        wide[1] = round_state_ref(wide[1].cpu(), token + 1).float()
    short = [0, 1, 4, 12, 15, 20, 28, 35, length]
    for cuts in (
        [short] if device == "cuda" and dtype != torch.float32 else [short, [0, length], [0, 9, 30, length]]
    ):
        state = empty_states(case, torch.float16, device)
        outs = [scan(inputs, state, a, slice(a, b)) for a, b in pairwise(cuts)]
        assert_bit_equal(torch.cat(outs), torch.cat(parts), f"out, cut at {cuts}")
        assert_bit_equal(state[1].float(), wide[1], "state")
        assert state[[0, 2]].isnan().all()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cuts_on_the_grid_change_no_bit(case, dtype, device):
    """Chunks round where they end, whether the prompt is cut there or not; the mean error is that of the roundings."""
    grid = max(scan_grid_tokens(device, dtype), 16)
    length = 3 * grid + grid // 2 + 3
    inputs = scan_inputs(case, length, dtype, device)
    outs, states = [], []
    for cuts in ([0, length], [0, grid, 3 * grid, length], [0, 2 * grid, length]):
        state = empty_states(case, torch.float16, device)
        outs.append(torch.cat([scan(inputs, state, a, slice(a, b)) for a, b in pairwise(cuts)]))
        states.append(state[1])
    for out, state in zip(outs[1:], states[1:], strict=True):
        assert_bit_equal(out, outs[0], "out")
        assert_bit_equal(state, states[0], "state")
    wide = empty_states(case, torch.float32, device)
    expected = scan(inputs, wide, 0, slice(0, length))
    error = (outs[0] - expected).double().norm() / expected.double().norm()
    assert error < (3e-3 if dtype == torch.float32 else 1e-2)
    error = (states[0].double() - wide[1].double()).norm() / wide[1].double().norm()
    assert error < 3e-3


def test_snapshots_are_rounded_as_the_slot_is(dtype, device):
    grid = max(scan_grid_tokens(device, dtype), 9)
    case, length, at = CASES["p64_n128"], grid + 14, grid
    inputs = scan_inputs(case, length, dtype, device)
    state = empty_states(case, torch.float16, device)
    index = [torch.tensor(v, dtype=torch.int32, device=device) for v in ([0, length], [0], [1], [1])]
    lists = [torch.tensor(v, dtype=torch.int32, device=device) for v in ([0, 1], [at], [2])]
    moving = [inputs[name] for name in ("x", "B", "C", "dt")]
    constants = [inputs[name] for name in ("A", "D", "dt_bias")]
    ops.ssm_scan(*moving, *constants, state, *index, snapshots=ops.Snapshots(*lists))
    alone = empty_states(case, torch.float16, device)
    scan(inputs, alone, 0, slice(0, at))
    assert_bit_equal(state[2], alone[1], "snapshot")
    scan(inputs, alone, at, slice(at, length))
    assert_bit_equal(state[1], alone[1], "slot")


def test_a_slow_state_keeps_its_mean(device):
    """Inputs below half a step of float16 add up; rounding to nearest, the control, would lose every one of them."""
    length, step = 1024, 2.0**-12  # a quarter of the step at 1
    inputs = {
        "x": torch.full((length, 1, 64), step, device=device),
        "B": torch.ones(length, 1, 64, device=device),
        "C": torch.zeros(length, 1, 64, device=device),
        "dt": torch.full((length, 1), 30.0, device=device),  # clamped to 1 below
        "A": torch.full((1,), -1e-30, device=device),
        "D": torch.zeros(1, device=device),
        "dt_bias": torch.zeros(1, device=device),
    }
    state = torch.ones(2, 1, 64, 64, dtype=torch.float16, device=device)
    index = [torch.tensor(v, dtype=torch.int32, device=device) for v in ([0, length], [1], [1], [1])]
    moving = [inputs[name] for name in ("x", "B", "C", "dt")]
    ops.ssm_scan(*moving, inputs["A"], inputs["D"], inputs["dt_bias"], state, *index, dt_max=1.0)
    expected = 1 + length * step
    nearest = torch.ones((), dtype=torch.float16)
    for _ in range(length):
        nearest = (nearest.float() + step).half()
    mean = state[1].double().mean().item()
    # Of 4,096 elements, each the sum of 1,024 roundings of variance at most 2^-20 / 4.
    tolerance = 5 * (length * 2.0**-22 / 4096) ** 0.5
    assert abs(mean - expected) < tolerance < abs(nearest.item() - expected)


@pytest.mark.parametrize("case", WINDOWED.values(), ids=WINDOWED)
@pytest.mark.parametrize("query_len", [1, 3])
def test_windows_over_half_states_stay_near_the_oracle(case, query_len, dtype, device):
    end = 3 * WINDOW + 5
    inputs = Inputs.draw(case, 2, end, dtype, device)
    rows = WindowedRows(case, [4, 4], dtype, device, ssm_dtype=torch.float16)
    oracle = rows.oracle()
    actual = walk(rows, inputs, end, query_len).cpu().double()
    expected = walk(oracle, inputs.in_float64(), end, query_len)
    error = (actual - expected).norm() / expected.norm()
    assert error < (4e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("case", WINDOWED.values(), ids=WINDOWED)
def test_half_states_are_those_of_the_row_alone_and_survive_rewinds(case, dtype, device):
    """Ragged rows, now and then set back, have the bits of the same row alone, token by token."""
    origins = [1, 2, 9, 15, 16, 17, 30, 31, 33]
    inputs = Inputs.draw(case, len(origins), 96, dtype, device)
    rows = WindowedRows(case, origins, dtype, device, ssm_dtype=torch.float16)
    alone = WindowedRows(case, origins, dtype, device, ssm_dtype=torch.float16)
    for step in range(8):
        counts = [1 + (step + 3 * row) % 8 for row in range(len(origins))]
        out = rows.step(inputs, counts).split(counts)
        for row in (0, 3, 8):
            single = torch.cat([alone.step(inputs, [1], [row]) for _ in range(counts[row])])
            assert_bit_equal(out[row], single, f"row {row} at step {step}")
        if step % 3 == 2:
            rows.rewind(1)
            alone.rewind(1)


@pytest.mark.parametrize("case", WINDOWED.values(), ids=WINDOWED)
@pytest.mark.parametrize("num_tokens", [12, 27, 31])
def test_a_folded_half_state_is_near_that_of_a_float32_one(case, num_tokens, dtype, device):
    origin = 5
    inputs = Inputs.draw(case, 1, 64, dtype, device)
    states = []
    for ssm_dtype in (torch.float16, torch.float32):
        rows = WindowedRows(case, [origin], dtype, device, ssm_dtype=ssm_dtype)
        rows.ssm_state = rows.ssm_state.half().to(ssm_dtype)
        walk(rows, inputs, origin + num_tokens)
        base = torch.tensor([0, rows.bases[0], 0], dtype=torch.int32, device=device)
        copies = np.array([(1, 2, origin + num_tokens, 0)], STATE_COPY)
        memory = torch.from_numpy(copies.view(np.uint8).copy()).to(device)
        ops.fold_states(rows.weights, rows.conv_state, rows.ssm_state, rows.log, base, memory.data_ptr(), 1)
        states.append(rows.ssm_state[2].cpu().float())
    half, wide = states
    steps = 2.0 ** (wide.abs().clamp(min=2.0**-14).log2().floor() - 10)
    assert ((half - wide).abs() <= (1 + num_tokens) * steps.max()).all()
    assert (half - wide).abs().max() > 0
