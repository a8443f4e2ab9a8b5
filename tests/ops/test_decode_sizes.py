"""The windowed decode step over every mixer size it promises, and over up to 512 rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.cases import MODEL_SHAPES, MambaCase
from tests.compare import assert_bit_equal
from tests.ops.slot_windows import Inputs, WindowedRows

pytestmark = pytest.mark.gpu

SIZES = list(product((64, 80, 128), (64, 128, 256), (1, 2, 8)))  # P, N, G
BF16 = torch.bfloat16


@pytest.mark.parametrize(("head_dim", "state_size", "num_groups"), SIZES)
@pytest.mark.parametrize("ssm_dtype", [torch.float32, torch.float16], ids=["state32", "state16"])
def test_promised_sizes_against_the_oracle(head_dim, state_size, num_groups, ssm_dtype):
    """Steps of one token and of several, in turn, over a whole window and into the next."""
    case, origins = MambaCase(8, head_dim, num_groups, state_size), [1, 13, 16]
    rows = WindowedRows(case, origins, BF16, "cuda", max_rewind=3, ssm_dtype=ssm_dtype)
    oracle = rows.oracle()
    inputs = Inputs.draw(case, len(origins), 64, BF16, "cuda")
    for step in range(10):
        counts = [1] * len(origins) if step % 2 else [1 + (step + row) % 4 for row in range(len(origins))]
        actual, expected = rows.step(inputs, counts), oracle.step(inputs.in_float64(), counts)
        error = (actual.cpu().double() - expected).norm() / expected.norm()
        assert error < 3e-2, f"step {step}"
        if step % 4 == 3:
            rows.rewind(2)
            oracle.rewind(2)


def assert_rows_are_those_alone(
    rows: WindowedRows, alone: WindowedRows, inputs: Inputs, query_len: int
) -> None:
    """Three steps of one token and of query_len in turn; the first, a middle and the last row have their own bits."""
    num_rows = len(rows.positions)
    for step in range(3):
        counts = [query_len if (step + row) % 2 else 1 for row in range(num_rows)]
        out = rows.step(inputs, counts).split(counts)
        for row in {0, num_rows // 2, num_rows - 1}:
            single = torch.cat([alone.step(inputs, [1], [row]) for _ in range(counts[row])])
            assert_bit_equal(out[row], single, f"row {row} at step {step}")


def twins(case: MambaCase, num_rows: int) -> tuple[WindowedRows, WindowedRows, Inputs]:
    """Two sets of the same rows, each row at a phase of its own, and 48 positions of inputs."""
    origins = [1 + 7 * row % 33 for row in range(num_rows)]
    rows, alone = (WindowedRows(case, origins, BF16, "cuda") for _ in range(2))
    return rows, alone, Inputs.draw(case, num_rows, 48, BF16, "cuda")


@pytest.mark.parametrize("num_rows", [64, 65, 257, 511, 512])
@pytest.mark.parametrize("query_len", [1, 4])
def test_hundreds_of_rows(num_rows, query_len):
    assert_rows_are_those_alone(*twins(MambaCase(4, 64, 2, 128), num_rows), query_len)


@pytest.mark.parametrize("name", ["nano30b", "nano9b", "granite_tiny", "mamba2_2.7b"])
@pytest.mark.parametrize("num_rows", [1, 7, 33])
@pytest.mark.parametrize("query_len", [1, 2])
def test_mixers_of_published_models(name, num_rows, query_len):
    assert_rows_are_those_alone(*twins(MODEL_SHAPES[name].mamba, num_rows), query_len)


@pytest.mark.parametrize("norm_group_size", [512, 128, 64, 32])
def test_the_norm_has_groups_of_its_own(norm_group_size):
    """Of more or fewer channels than a group of B and C serves: against the oracle."""
    case, origins = MambaCase(8, 64, 2, 128), [1, 13, 16]
    rows = WindowedRows(case, origins, BF16, "cuda")
    rows.weights = replace(rows.weights, norm_group_size=norm_group_size)
    oracle, inputs = rows.oracle(), Inputs.draw(case, len(origins), 48, BF16, "cuda")
    for counts in ([1, 1, 1], [1, 2, 3], [1, 1, 1]):
        actual, expected = rows.step(inputs, counts), oracle.step(inputs.in_float64(), counts)
        assert (actual.cpu().double() - expected).norm() / expected.norm() < 2e-2
