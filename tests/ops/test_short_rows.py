"""The convolution over crowds of short rows: many a tile, empty ones between, rows that straddle tiles, snapshots.

A GPU's tiles grow with the number of tokens (choose_tile_tokens of csrc/cuda/causal_conv1d.cu), so it takes thousands.
"""

from __future__ import annotations

import random
from itertools import accumulate, pairwise

import pytest
import torch

from headway import ops
from headway.ops import reference
from tests.cases import MambaCase, Rows
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import conv_arguments, in_float64, on_device

CASES = {
    "four_taps": MambaCase(120, 8, 1, 64, gap=24),
    "three_taps": MambaCase(64, 8, 4, 64, width=3),
    "two_taps": MambaCase(33, 8, 1, 16, width=2, gap=3, has_bias=False),  # not in 16-byte pieces
}
CROWDS = {
    "few_tokens": ((0, 1, 2, 3), 40),
    "empty_ends": ((0, 0, 0, 0, 0, 0, 0, 0, 1), 60),
}
GPU_CROWDS = {
    "crowd": ((0, 0, 1, 1, 2, 3, 4, 5, 17), 1500),
    "giants": ((0, 1, 2, 3, 700), 40),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_crowd = pytest.mark.parametrize(("lengths", "num_rows"), CROWDS.values(), ids=CROWDS)
each_gpu_crowd = pytest.mark.parametrize(("lengths", "num_rows"), GPU_CROWDS.values(), ids=GPU_CROWDS)


def crowd(lengths: tuple[int, ...], num_rows: int) -> Rows:
    """Of such lengths, at positions around the convolution's reach; the first and the last row are empty."""
    rng = random.Random(num_rows)
    chosen = [rng.choice(lengths) for _ in range(num_rows - 2)]
    starts = [rng.choice([0, 0, 1, 2, 3, 4, 100]) for _ in range(num_rows)]
    return Rows((0, *chosen, 0), tuple(starts))


def with_snapshots(arguments: dict[str, object], rows: Rows) -> tuple[dict[str, object], ops.Snapshots]:
    """Of every third row, after each of its first four tokens and its last, in slots behind the others."""
    taken = [
        sorted(
            {*range(start + 1, start + min(length, 4) + 1), start + length}
            if length and r % 3 == 0
            else set()
        )
        for r, (start, length) in enumerate(zip(rows.starts, rows.lengths, strict=True))
    ]
    state = arguments["state"]
    starts = [0, *accumulate(map(len, taken))]
    slots = range(len(state), len(state) + starts[-1])
    lists = (starts, [position for positions in taken for position in positions], [*slots])
    snapshots = ops.Snapshots(*(torch.tensor(values, dtype=torch.int32) for values in lists))
    more = torch.full((starts[-1], *state.shape[1:]), torch.nan, dtype=state.dtype)
    return {**arguments, "state": torch.cat([state, more])}, snapshots


@each_case
@each_crowd
def test_crowds_against_the_oracle(case, lengths, num_rows, dtype, device):
    assert_near_the_oracle(case, crowd(lengths, num_rows), dtype, device)


@pytest.mark.gpu
@each_case
@each_gpu_crowd
def test_large_crowds_against_the_oracle(case, lengths, num_rows, dtype):
    assert_near_the_oracle(case, crowd(lengths, num_rows), dtype, "cuda")


def assert_near_the_oracle(case: MambaCase, rows: Rows, dtype: torch.dtype, device: str) -> None:
    arguments, snapshots = with_snapshots(conv_arguments(case, rows, dtype), rows)
    arguments["snapshots"] = snapshots
    oracle, given = in_float64(arguments), on_device(arguments, device)
    expected = reference.causal_conv1d_ref(**oracle)
    assert_close(ops.causal_conv1d(**given), expected, "out")
    state, exact = given["state"], oracle["state"].to(dtype)
    assert_bit_equal(state.nan_to_num(7.0), exact.nan_to_num(7.0), "slots")


@each_case
@each_crowd
def test_a_crowd_has_the_bits_of_its_parts(case, lengths, num_rows, dtype, device):
    assert_bits_of_the_parts(case, crowd(lengths, num_rows), dtype, device)


@pytest.mark.gpu
@each_case
@each_gpu_crowd
def test_a_large_crowd_has_the_bits_of_its_parts(case, lengths, num_rows, dtype):
    assert_bits_of_the_parts(case, crowd(lengths, num_rows), dtype, "cuda")


def assert_bits_of_the_parts(case: MambaCase, rows: Rows, dtype: torch.dtype, device: str) -> None:
    """Parts of 1 to 97 rows: tiles of other sizes."""
    arguments = on_device(conv_arguments(case, rows, dtype), device)
    initial, whole = arguments["state"].clone(), ops.causal_conv1d(**arguments)
    state, out = initial.clone(), torch.zeros_like(whole)
    begins = [0, *accumulate(rows.lengths)]
    for first, last in pairwise([0, 1, *range(3, rows.num_rows, 97), rows.num_rows]):
        tokens = slice(begins[first], begins[last])
        part = {name: arguments[name][first:last] for name in ("row_start", "read_slots", "write_slots")}
        bounds = arguments["query_start"][first : last + 1] - begins[first]
        x = arguments["x"][tokens]
        out[tokens] = ops.causal_conv1d(
            **{**arguments, **part, "x": x, "query_start": bounds, "state": state}
        )
    assert_bit_equal(out, whole, "out")
    assert_bit_equal(state, arguments["state"], "slots")
