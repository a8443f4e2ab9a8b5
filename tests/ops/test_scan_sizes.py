"""Every head dim, state size and number of groups that the scan promises, and mixes of few long and many short rows."""

from __future__ import annotations

import random
from itertools import accumulate, product

import pytest
import torch

from headway import ops
from headway.ops import reference
from tests.cases import MambaCase, Rows
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import in_float64, on_device, scan_arguments
from tests.ops.test_scan_chunks import RMS_OF_STATE, RMS_OF_Y, relative_rms, scan_alone

pytestmark = pytest.mark.gpu

HEADS = 8
SIZES = list(product((64, 80, 128), (64, 128, 256), (1, 2, 8)))  # P, N, G
ROWS = Rows((70, 1, 0, 9, 130, 8), (0, 5, 3, 64, 127, 0))
each_size = pytest.mark.parametrize(("head_dim", "state_size", "num_groups"), SIZES)
LONG = 1200


def mix() -> Rows:
    """300 rows of up to 12 tokens, some empty, and two long ones among them, one of which goes on from the grid."""
    rng = random.Random(11)
    lengths = [rng.choice([0, 1, 1, 2, 3, 8, 9, 12]) for _ in range(300)]
    starts = [rng.choice([0, 1, 63, 64, 200]) for _ in lengths]
    lengths[17], starts[17] = LONG, 0
    lengths[250], starts[250] = LONG + 5, 640
    return Rows(tuple(lengths), tuple(starts))


@each_size
def test_promised_sizes_against_the_oracle(head_dim, state_size, num_groups):
    """Ragged rows, one of which leaves snapshots on the grid and at its end; alone, a row has the same bits."""
    case = MambaCase(HEADS, head_dim, num_groups, state_size, gap=8)
    arguments = scan_arguments(case, ROWS, torch.bfloat16)
    more = torch.full((2, *arguments["state"].shape[1:]), torch.nan)
    arguments["state"] = torch.cat([arguments["state"], more])
    num_slots = len(arguments["state"])
    lists = ([0, 0, 0, 0, 0, 2, 2], [192, 257], [num_slots - 2, num_slots - 1])
    arguments["snapshots"] = ops.Snapshots(*(torch.tensor(values, dtype=torch.int32) for values in lists))
    oracle, given = in_float64(arguments), on_device(arguments, "cuda")
    initial = given["state"].clone()
    expected, actual = reference.ssm_scan_ref(**oracle), ops.ssm_scan(**given)
    assert relative_rms(actual, expected) < RMS_OF_Y
    assert_close(actual, expected, "y", tolerance=2.0**-7)
    slots = [*arguments["write_slots"].tolist(), num_slots - 2, num_slots - 1]
    assert relative_rms(given["state"].cpu()[slots], oracle["state"][slots]) < RMS_OF_STATE
    untouched = [slot for slot in range(num_slots) if slot not in slots]
    assert_bit_equal(given["state"][untouched], initial[untouched], "slots of nobody")
    assert_rows_alone(given | {"snapshots": None}, initial, actual, ROWS, range(ROWS.num_rows))


@pytest.mark.parametrize(
    "case",
    [MambaCase(16, 64, 8, 128), MambaCase(4, 80, 2, 128), MambaCase(2, 128, 1, 256), MambaCase(3, 64, 1, 64)],
    ids=lambda case: f"p{case.head_dim}_n{case.state_size}",
)
@pytest.mark.parametrize("has_bound", [False, True])
def test_long_rows_among_hundreds_of_short_ones(case, has_bound):
    """Each row has the bits that it has alone, whether or not the host knows the longest row's length."""
    rows = mix()
    arguments = on_device(scan_arguments(case, rows, torch.bfloat16), "cuda")
    initial = arguments["state"].clone()
    bound = {"max_query_len": rows.max_query_len} if has_bound else {}
    out = torch.full_like(arguments["x"].contiguous(), torch.nan)
    ops.ssm_scan(**arguments, **bound, out=out)
    assert bool(out.isfinite().all())
    assert_rows_alone(arguments, initial, out, rows, [0, 1, 16, 17, 18, 100, 249, 250, 251, 298, 299])


def assert_rows_alone(arguments, initial, out, rows, indices):
    begins = [0, *accumulate(rows.lengths)]
    for row in indices:
        tokens, slot = slice(begins[row], begins[row + 1]), int(arguments["write_slots"][row])
        state = initial.clone()
        alone = scan_alone(arguments, state, row, rows.starts[row], tokens)
        assert_bit_equal(alone, out[tokens], f"row {row}")
        assert_bit_equal(state[slot], arguments["state"][slot], f"state of row {row}")
