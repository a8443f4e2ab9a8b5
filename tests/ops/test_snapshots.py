"""States that prompts leave on the way: bit for bit what a row cut there ends with, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headway import ops
from headway.ops import reference
from headway.ops.mamba import scan_grid_tokens
from headway.ops.records import Snapshots
from tests.cases import MAMBA_CASES, NAN, Rows
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import conv_arguments, in_float64, on_device, scan_arguments

OPS = {
    "conv": (ops.causal_conv1d, reference.causal_conv1d_ref, conv_arguments, ("x",)),
    "scan": (ops.ssm_scan, reference.ssm_scan_ref, scan_arguments, ("x", "B", "C", "dt")),
}
ROWS = Rows((200, 1, 0, 70, 5, 2, 129), (0, 40, 3, 64, 59, 0, 128))
each_op = pytest.mark.parametrize("name", OPS)
each_case = pytest.mark.parametrize("case", MAMBA_CASES.values(), ids=MAMBA_CASES)


def positions_of(row: int, grid: int) -> list[int]:
    """Of one row: its first and last places, and some between, as far as the grid has them."""
    start, end = ROWS.starts[row], ROWS.starts[row] + ROWS.lengths[row]
    wanted = {start + 1, start + 2, start + 16, start + 31, start + 64, start + 65, start + 128, end}
    return sorted(p for p in wanted if start < p <= end and (p % grid == 0 or p == end))


def with_snapshots(
    arguments: dict[str, Any], grid: int, device: str
) -> tuple[dict[str, Any], list[tuple[int, int, int]]]:
    """The arguments with poisoned slots for the snapshots, and the snapshots as (row, position, slot).

    Row 5 leaves none, though its neighbours do.
    """
    taken = [(row, p) for row in range(ROWS.num_rows) if row != 5 for p in positions_of(row, grid)]
    state = arguments["state"]
    first_slot = state.shape[0]
    more = torch.full((len(taken) + 1, *state.shape[1:]), NAN, dtype=state.dtype, device=device)
    entries = [(row, p, first_slot + i) for i, (row, p) in enumerate(taken)]
    starts = [sum(row < r for row, _ in taken) for r in range(ROWS.num_rows + 1)]
    lists = (starts, [p for _, p in taken], [slot for _, _, slot in entries])
    snapshots = Snapshots(*(torch.tensor(values, dtype=torch.int32, device=device) for values in lists))
    return {**arguments, "state": torch.cat([state, more]), "snapshots": snapshots}, entries


def cut_at(arguments: dict[str, Any], names: tuple[str, ...], row: int, position: int) -> dict[str, Any]:
    """The row alone, up to the position, in the same slot."""
    begin = sum(ROWS.lengths[:row])
    count = position - ROWS.starts[row]
    changes = {"query_start": torch.tensor([0, count], dtype=torch.int32, device=arguments["state"].device)}
    changes |= {name: arguments[name][begin : begin + count] for name in names}
    changes |= {name: arguments[name][row : row + 1] for name in ("row_start", "read_slots", "write_slots")}
    return {**arguments, **changes, "state": arguments["state"].clone()}


@each_op
@each_case
def test_a_snapshot_is_what_a_row_cut_there_ends_with(name, case, dtype, device):
    op, _, build, per_token = OPS[name]
    given = on_device(build(case, ROWS, dtype), device)
    cuts = {key: value.clone() if key == "state" else value for key, value in given.items()}
    plain = {**cuts, "state": given["state"].clone()}
    snapped, entries = with_snapshots(given, scan_grid_tokens(device, dtype) if name == "scan" else 1, device)
    out, plain_out = op(**snapped), op(**plain)
    assert_bit_equal(out, plain_out, f"{name}: outputs with and without snapshots")
    num_plain = plain["state"].shape[0]
    assert_bit_equal(snapped["state"][:num_plain], plain["state"], f"{name}: the rows' own states")
    for row, position, slot in entries:
        alone = cut_at(cuts, per_token, row, position)
        op(**alone)
        final = alone["state"][int(cuts["write_slots"][row])]
        assert_bit_equal(snapped["state"][slot], final, f"{name}: row {row} at {position}")
    assert torch.isnan(snapped["state"][-1]).all()


@each_op
@each_case
def test_snapshots_against_the_oracle(name, case, dtype, device):
    op, ref, build, _ = OPS[name]
    arguments, entries = with_snapshots(
        build(case, ROWS, dtype), scan_grid_tokens(device, dtype) if name == "scan" else 1, "cpu"
    )
    oracle, given = in_float64(arguments), on_device(arguments, device)
    ref(**oracle)
    op(**given)
    slots = [slot for _, _, slot in entries]
    is_rounded = name == "scan" and device == "cuda" and dtype == torch.bfloat16
    tolerance = 2.0**-7 if is_rounded else 1e-5
    assert_close(
        given["state"].cpu()[slots], oracle["state"][slots], f"{name} snapshots", tolerance=tolerance
    )


@each_op
def test_a_row_restored_from_a_snapshot_goes_on_as_if_never_cut(name, dtype, device):
    """Read slot and write slot differ; the snapshot stays as it was, to be restored again."""
    op, _, build, per_token = OPS[name]
    case, row, position = MAMBA_CASES["regular"], 0, 128
    given = on_device(build(case, ROWS, dtype), device)
    whole, entries = with_snapshots(given, scan_grid_tokens(device, dtype), device)
    out = op(**whole)
    snapshot = next(slot for r, p, slot in entries if (r, p) == (row, position))
    kept = whole["state"][snapshot].clone()
    rest, target = ROWS.lengths[row] - position, whole["state"].shape[0] - 1
    changes = {key: whole[key][position : ROWS.lengths[row]] for key in per_token}
    numbers = {
        "query_start": [0, rest],
        "row_start": [position],
        "read_slots": [snapshot],
        "write_slots": [target],
    }
    changes |= {key: torch.tensor(value, dtype=torch.int32, device=device) for key, value in numbers.items()}
    again = op(**{**whole, **changes, "snapshots": None})
    assert_bit_equal(again, out[position : ROWS.lengths[row]], f"{name}: the rest of the row")
    own = whole["state"][int(whole["write_slots"][row])]
    assert_bit_equal(whole["state"][target], own, f"{name}: final state")
    assert_bit_equal(whole["state"][snapshot], kept, f"{name}: the snapshot")


@each_op
def test_empty_lists_are_no_snapshots(name, dtype, device):
    op, _, build, _ = OPS[name]
    given = on_device(build(MAMBA_CASES["regular"], ROWS, dtype), device)
    plain = {**given, "state": given["state"].clone()}
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    starts = torch.zeros(ROWS.num_rows + 1, dtype=torch.int32, device=device)
    out = op(**given, snapshots=Snapshots(starts, nothing, nothing))
    assert_bit_equal(out, op(**plain), name)
    assert_bit_equal(given["state"], plain["state"], f"{name}: states")


@each_op
def test_lists_of_the_wrong_size_are_refused(name, device):
    op, _, build, _ = OPS[name]
    given = on_device(build(MAMBA_CASES["regular"], ROWS, torch.float32), device)
    ints = {n: torch.zeros(n, dtype=torch.int32, device=device) for n in (1, 2, ROWS.num_rows + 1)}
    with pytest.raises(ValueError, match=r"snapshots\.starts"):
        op(**given, snapshots=Snapshots(ints[2], ints[1], ints[1]))
    with pytest.raises(ValueError, match=r"snapshots\.slots"):
        op(**given, snapshots=Snapshots(ints[ROWS.num_rows + 1], ints[1], ints[2]))
