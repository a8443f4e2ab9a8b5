"""move_records against the reference: odd sizes, no move, many moves, poisoned bystanders, pinned host memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from headway import ops
from headway.ops import reference
from tests.compare import assert_bit_equal
from tests.inputs import normal

SHAPES = {
    "aligned": [(256,), (4, 16, 64)],
    "words": [(5,), (1, 7), (3, 3)],
    "bytes": [(3,), (1,)],
    "pieces": [(16384,), (4097,), (1,), (3, 8192)],
}
MOVES = {"none": [], "one": [(3, 9)], "several": [(3, 9), (0, 1), (3, 5), (7, 2), (11, 10)]}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize(("is_out", "max_thread_blocks"), [(False, 32), (True, 2)])
def test_records_move_in_all_pools_and_nothing_else_does(
    shapes, moves, is_out, max_thread_blocks, dtype, device
):
    is_pinned = device == "cuda"
    on_device = [normal(12, *shape, dtype=dtype, seed=i).to(device) for i, shape in enumerate(shapes)]
    on_host = [normal(13, *shape, dtype=dtype, seed=50 + i) for i, shape in enumerate(shapes)]
    if is_pinned:
        on_host = [tensor.pin_memory() for tensor in on_host]
    sources, targets = (on_device, on_host) if is_out else (on_host, on_device)
    records = torch.tensor(moves, dtype=torch.int32).reshape(-1, 2)
    expected = [target.clone() for target in targets]
    reference.move_records_ref(ops.RecordPools.pair(sources, expected, torch.device(device)), records)
    ops.move_records(
        ops.RecordPools.pair(sources, targets, torch.device(device)),
        records.pin_memory() if is_pinned else records,
        max_thread_blocks,
    )
    if is_pinned:
        torch.cuda.synchronize()
    for target, kept in zip(targets, expected, strict=True):
        assert_bit_equal(target, kept, "target")


def test_pieces_follow_each_other():
    pools = ops.RecordPools.pair(
        *([torch.zeros(2, num) for num in (4096, 4097, 1)] for _ in range(2)), torch.device("cpu")
    )
    firsts = pools.table[:, 5].tolist()
    assert firsts == [0, 1, 3]
    assert pools.num_pieces == 4
    assert all(first < second for first, second in pairwise(firsts))


def test_pools_that_do_not_fit_are_refused():
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"\[4\] torch.float32 cannot move to \[5\]"):
        ops.RecordPools.pair([torch.zeros(3, 4)], [torch.zeros(3, 5)], cpu)
    with pytest.raises(ValueError, match="sources"):
        ops.RecordPools.pair([torch.zeros(3, 4, 2).transpose(1, 2)], [torch.zeros(3, 2, 4)], cpu)
    pools = ops.RecordPools.pair([torch.zeros(3, 4)], [torch.zeros(3, 4)], cpu)
    with pytest.raises(ValueError, match=r"moves must be \[k, 2\] int32"):
        ops.move_records(pools, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="max_thread_blocks must be at least 1, got 0"):
        ops.move_records(pools, torch.zeros(0, 2, dtype=torch.int32), max_thread_blocks=0)
