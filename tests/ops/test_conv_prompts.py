"""The convolution over prompts of a model's width, where a row spans many tiles or a tile many rows: the bits are those
of each row alone, and tokens behind the last row are neither read into anything nor written."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from headway import ops
from tests.compare import assert_bit_equal

pytestmark = pytest.mark.gpu

LENGTHS = {
    "tiles_of_a_row": (0, 1, 2, 3, 0, 0, 4099, 5, 17, 1, 1, 1300, 0),
    "rows_of_a_tile": (0, 1, 2, 3, 7, 0, 60, 0, 1, 33) * 24,
    "one_short": (13,),
}
NUM_CHANNELS = {"whole_warps": 3328, "idle_lanes": 264, "channel_by_channel": 331}
NUM_PADDED = 5


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("num_channels", NUM_CHANNELS.values(), ids=NUM_CHANNELS)
def test_rows_together_are_bit_equal_to_rows_alone(num_channels, lengths):
    torch.manual_seed(num_channels)
    num_rows, num_tokens = len(lengths), sum(lengths)
    x, weight, bias, state = (
        torch.randn(*shape, num_channels + gap, device="cuda", dtype=torch.bfloat16)[..., :num_channels]
        for shape, gap in (((num_tokens + NUM_PADDED,), 40), ((4,), 0), ((), 0), ((2 * num_rows, 3), 0))
    )
    x[num_tokens:] = float("nan")
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    starts = torch.randint(2, (num_rows,), device="cuda", dtype=torch.int32) * 64
    slots = torch.randperm(num_rows, device="cuda").int()
    written = torch.where(starts == 0, slots + num_rows, slots)  # in place, and beside what is read
    alone, alone_state = torch.full_like(x, float("nan")), state.clone()

    together = ops.causal_conv1d(
        x, weight, bias, state, torch.tensor(bounds, device="cuda").int(), starts, slots, written,
        out=torch.full(x.shape, float("nan"), device="cuda", dtype=x.dtype),
    )  # fmt: skip
    for row, (begin, end) in enumerate(pairwise(bounds)):
        query_start = torch.tensor([0, end - begin], device="cuda").int()
        one = (values[row : row + 1] for values in (starts, slots, written))
        alone[begin:end] = ops.causal_conv1d(x[begin:end], weight, bias, alone_state, query_start, *one)
    assert_bit_equal(together, alone, "causal_conv1d")
    assert_bit_equal(state, alone_state, "causal_conv1d: states")
