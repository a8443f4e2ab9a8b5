"""The decode step over slot windows: against states in place, over every phase of a window, and across rewinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headway import ops
from headway.errors import ArgumentError
from headway.ops import reference
from headway.ops.layout import STATE_COPY
from tests.cases import MambaCase
from tests.compare import assert_bit_equal, assert_close
from tests.ops.slot_windows import WINDOW, Inputs, WindowedRows, in_place, walk

CASES = {
    "p64_g2": MambaCase(4, 64, 2, 128),
    "p80_g1": MambaCase(3, 80, 1, 128),
    "p64_n64": MambaCase(5, 64, 1, 64),
    "p128_n256": MambaCase(3, 128, 3, 256),
    "many_heads": MambaCase(20, 16, 1, 64),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SMALL = MambaCase(2, 32, 1, 64)


@each_case
def test_against_the_oracle(case, dtype, device):
    """Ragged rows of their own phases over two windows, some of their tokens taken back; states and rings too."""
    origins = [1, 3, 15, 16, 40]
    rows = WindowedRows(case, origins, dtype, device, max_rewind=3)
    oracle = rows.oracle()
    inputs = Inputs.draw(case, len(origins), 96, dtype, device)
    for step in range(14):
        counts = [1 + (step + row) % 4 for row in range(len(origins))]
        actual, expected = rows.step(inputs, counts), oracle.step(inputs.in_float64(), counts)
        error = (actual.cpu().double() - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), f"step {step}"
        if step % 3 == 2:
            rows.rewind(step % 4)
            oracle.rewind(step % 4)
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    used = slice(1, len(origins) + 1)
    assert_close(rows.ssm_state[used], oracle.ssm_state[used], "state", tolerance=tolerance)
    assert_bit_equal(rows.conv_state[used], oracle.conv_state[used].to(dtype), "convolution columns")
    assert_bit_equal(
        rows.log.raw[used].nan_to_num(9), oracle.log.raw[used].to(dtype).nan_to_num(9), "raw columns"
    )


@each_case
@pytest.mark.parametrize("origin", [1, 14, 16])
@pytest.mark.parametrize("query_len", [1, 3, 8])
def test_equals_states_in_place(case, origin, query_len, dtype, device):
    end = origin + 3 * WINDOW + 2
    inputs = Inputs.draw(case, 2, end, dtype, device)
    rows = WindowedRows(case, [origin] * 2, dtype, device)
    expected = in_place(rows, inputs, end)
    actual = walk(rows, inputs, end, query_len)
    if device == "cpu":
        assert_bit_equal(actual, expected, "out")
        return
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < (2e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("max_rewind", [1, 3, 7, 11])
def test_rewinds_leave_no_trace(max_rewind, dtype, device):
    """At every phase, back by every length: what follows has the bits of a row that never went ahead."""
    case, origin, end = SMALL, 5, 5 + 2 * WINDOW + 9
    inputs = Inputs.draw(case, 1, end + 16, dtype, device)
    wrong = Inputs.draw(case, 1, end + 16, dtype, device, seed=7)
    query_len = min(max_rewind + 1, 4)
    rows = WindowedRows(case, [origin], dtype, device, max_rewind=max_rewind)
    expected = walk(rows, inputs, end)
    for length in range(1, max_rewind + 1):
        rows = WindowedRows(case, [origin], dtype, device, max_rewind=max_rewind)
        parts = []
        while (position := rows.positions[0]) < end:
            parts.append(walk(rows, inputs, position + 1))
            walk(rows, wrong, position + 1 + length, query_len)
            rows.rewind(length)
        assert_bit_equal(torch.cat(parts, dim=1), expected, f"back by {length}")


@each_case
def test_batch_mates_and_query_lengths_change_nothing(case, dtype, device):
    """Ragged rows of their own phases, among padding, have the bits of the same row alone, token by token."""
    origins = [1, 2, 9, 15, 16, 17, 30, 31, 33]
    inputs = Inputs.draw(case, len(origins), 96, dtype, device)
    rows = WindowedRows(case, origins, dtype, device)
    alone = WindowedRows(case, origins, dtype, device)
    for step in range(8):
        counts = [1 + (step + 3 * row) % 8 for row in range(len(origins))]
        out = rows.step(inputs, counts).split(counts)
        for row in (0, 3, 8):
            single = torch.cat([alone.step(inputs, [1], [row]) for _ in range(counts[row])])
            assert_bit_equal(out[row], single, f"row {row} at step {step}")


ROW_COUNTS = {**dict.fromkeys(CASES, (3, 18, 26, 40)), "one_wide_group": (1, 8, 9, 20)}


@pytest.mark.parametrize("name", ROW_COUNTS)
def test_the_number_of_rows_changes_nothing(name, dtype, device):
    """Few rows and many have kernels of their own; a row's bits are those it has alone, and alone near the oracle's."""
    case, counts = CASES.get(name, MambaCase(48, 64, 1, 128)), ROW_COUNTS[name]
    origins = [1 + 7 * row % 33 for row in range(counts[-1])]
    inputs = Inputs.draw(case, len(origins), 40, dtype, device)
    rows = WindowedRows(case, origins, dtype, device)
    alone = WindowedRows(case, origins, dtype, device)
    oracle = rows.oracle()
    for num_rows in counts:
        first = rows.step(inputs, [1] * num_rows)[:2]
        own = torch.cat([alone.step(inputs, [1], [row]) for row in range(len(first))])
        assert_bit_equal(first, own, f"among {num_rows} rows")
        expected = oracle.step(inputs.in_float64(), [1] * len(first))
        error = (own.cpu().double() - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_padding_touches_nothing(dtype, device):
    rows = WindowedRows(SMALL, [4], dtype, device)
    inputs = Inputs.draw(SMALL, 1, 40, dtype, device)
    walk(rows, inputs, 9)
    kept = [t.clone() for t in (rows.conv_state, rows.ssm_state, rows.log.columns, rows.log.dt, rows.log.raw)]

    def index(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    out = ops.mamba_decode(
        *inputs.of([0, 0], [0, 0], [1, 1]), rows.weights, rows.conv_state, rows.ssm_state, rows.log,
        index(0, 1, 2), index(0, 0), index(0, 0), index(0, 0),
    )  # fmt: skip
    assert not out.any()
    after = (rows.conv_state, rows.ssm_state, rows.log.columns, rows.log.dt, rows.log.raw)
    for tensor, before in zip(after, kept, strict=True):
        assert torch.equal(tensor[1:].nan_to_num(7), before[1:].nan_to_num(7))


def test_refuses_longer_rows_than_can_be_taken_back(device):
    rows = WindowedRows(SMALL, [4], torch.float32, device, max_rewind=2)
    with pytest.raises(ValueError, match=r"max_query_len must be in 1\.\.3, got 4"):
        rows.step(Inputs.draw(SMALL, 1, 40, torch.float32, device), [4])


def test_refuses_inputs_of_their_own_strides(device):
    rows = WindowedRows(SMALL, [4], torch.float32, device)
    rows.spread_tokens = torch.Tensor.contiguous
    with pytest.raises(ValueError, match="slices of one tensor, got token strides"):
        rows.step(Inputs.draw(SMALL, 1, 40, torch.float32, device), [2])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "message"),
    [
        (MambaCase(2, 24, 1, 64), "P a multiple of 16, got W = 4, N = 64, P = 24"),
        (MambaCase(2, 32, 1, 96), "got W = 4, N = 96, P = 32"),
        (MambaCase(2, 32, 1, 64, width=3), "got W = 3, N = 64, P = 32"),
    ],
    ids=str,
)
def test_refuses_mixers_without_a_kernel_and_touches_nothing(case, message):
    rows = WindowedRows(case, [4], torch.bfloat16, "cuda")
    kept = [t.clone() for t in (rows.conv_state, rows.ssm_state, rows.log.columns, rows.log.dt, rows.log.raw)]
    with pytest.raises(ArgumentError, match=f"^mamba_decode: on a GPU .*{message}"):
        rows.step(Inputs.draw(case, 1, 40, torch.bfloat16, "cuda"), [1])
    after = (rows.conv_state, rows.ssm_state, rows.log.columns, rows.log.dt, rows.log.raw)
    for tensor, before in zip(after, kept, strict=True):
        assert_bit_equal(tensor, before, "states and log")


@pytest.mark.gpu
def test_refuses_more_tokens_than_a_gpu_takes():
    rows = WindowedRows(SMALL, [4], torch.bfloat16, "cuda", max_rewind=11, max_query_len=12)
    with pytest.raises(ArgumentError, match="max_query_len must be at most 8 on a GPU, got 9"):
        rows.step(Inputs.draw(SMALL, 1, 40, torch.bfloat16, "cuda"), [9])


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 11, 12, 27, 28, 31])
@pytest.mark.parametrize("target", [1, 2])
def test_a_folded_state_is_that_in_place(num_tokens, target, dtype, device):
    """To another slot and to its own, from every phase: what a prompt chunk continues from, log and all."""
    case, origin = CASES["p64_g2"], 5
    rows = WindowedRows(case, [origin], dtype, device)
    oracle = rows.oracle()
    inputs = Inputs.draw(case, 1, 64, dtype, device)
    if num_tokens:
        walk(rows, inputs, origin + num_tokens)
        walk(oracle, inputs.in_float64(), origin + num_tokens)
    state_base = torch.tensor([0, rows.bases[0], 0], dtype=torch.int32, device=device)
    copies = np.array([(1, target, origin + num_tokens, 0)], STATE_COPY)
    memory = torch.from_numpy(copies.view(np.uint8).copy()).to(device)
    held = (rows.weights, rows.conv_state, rows.ssm_state, rows.log, state_base)
    ops.fold_states(*held, memory.data_ptr(), 1)
    held = (oracle.weights, oracle.conv_state, oracle.ssm_state, oracle.log, state_base.cpu())
    reference.fold_states_ref(*held, [(1, target, origin + num_tokens)])
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    assert_close(rows.ssm_state[target], oracle.ssm_state[target], "state", tolerance=tolerance)
    assert_bit_equal(rows.conv_state[target], oracle.conv_state[target].to(dtype), "convolution columns")
