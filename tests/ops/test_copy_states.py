"""copy_states against the reference: odd sizes, no copy, many copies, poisoned bystanders."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headway import ops
from headway.ops import reference
from headway.ops.layout import STATE_COPY
from tests.compare import assert_bit_equal
from tests.inputs import normal

SHAPES = {
    "aligned": [(3, 12, 3, 256), (3, 12, 4, 16, 64)],
    "words": [(2, 12, 3, 5), (2, 12, 3, 1, 7)],
    "odd": [(1, 12, 3, 3)],
    "large": [(2, 12, 3, 1024), (2, 12, 16, 64, 128)],
}
COPIES = {
    "none": [],
    "one": [(3, 9)],
    "onto_itself": [(4, 4)],
    "several": [(3, 9), (3, 1), (5, 5), (7, 2), (11, 10)],
}


def records(copies: list[tuple[int, int]], device: str) -> torch.Tensor:
    """StateCopy records in memory of the device."""
    packed = np.array([(source, target, 17, 0) for source, target in copies], STATE_COPY)
    return torch.from_numpy(packed.view(np.uint8).copy()).to(device)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("copies", COPIES.values(), ids=COPIES)
def test_states_move_in_all_layers_and_nothing_else_does(shapes, copies, dtype, device):
    pools = [
        normal(*shape, dtype=dtype if i == 0 else torch.float32, seed=i + 1) for i, shape in enumerate(shapes)
    ]
    for pool in pools:
        pool[:, 6] = float("nan")
    given = [pool.to(device) for pool in pools]
    packed = records(copies, device)
    ops.copy_states(given, packed.data_ptr(), len(copies))
    reference.copy_states_ref(pools, copies)
    for actual, expected in zip(given, pools, strict=True):
        assert_bit_equal(actual, expected, "pool")


def test_pools_that_do_not_fit_are_refused(device):
    pools = [torch.zeros(2, 3, 4, device=device), torch.zeros(3, 3, 4, device=device)]
    with pytest.raises(ValueError, match="2 layers each, got 3"):
        ops.copy_states(pools, 0, 1)
    with pytest.raises(ValueError, match="1 to 4, got 5"):
        ops.copy_states(pools[:1] * 5, 0, 1)
    with pytest.raises(ValueError, match="pools"):
        ops.copy_states([pools[0].transpose(1, 2)], 0, 1)
