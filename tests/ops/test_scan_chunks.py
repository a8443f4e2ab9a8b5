"""The chunked scan of the GPU: bf16 prompts, where the promise of equal bits holds for cuts on the chunk grid only."""

from __future__ import annotations

import pytest
import torch

from headway import ops
from headway.ops import reference
from tests.cases import MambaCase, Rows
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import in_float64, on_device, scan_arguments, with_gaps

pytestmark = pytest.mark.gpu

CHUNK_TOKENS = 64  # kChunkTokens of csrc/cuda/ssm_scan.h
# Rounding to bf16 costs 1.65e-3. Here decays are strong, so that y is little more than one product of rounded operands,
# rounded again; the state is one such product.
RMS_OF_Y = 2.8e-3
RMS_OF_STATE = 1.8e-3
PER_TOKEN = ("x", "B", "C", "dt")
CASES = {
    "p64_n128_g8": MambaCase(16, 64, 8, 128, gap=24),
    "p80_n128_g2": MambaCase(4, 80, 2, 128),
    "p128_n128_g1": MambaCase(2, 128, 1, 128, gap=8),
    "p64_n64_g1": MambaCase(2, 64, 1, 64),
    # Alone a row's chunks are shared among blocks, among mates not: other kernels, the same bits
    "p64_n64_g8": MambaCase(16, 64, 8, 64),
    "p80_n64_g2": MambaCase(2, 80, 2, 64),
    "p64_n256_g1": MambaCase(2, 64, 1, 256),
    "p128_n256_g2": MambaCase(2, 128, 2, 256),
    "p24_n128_g1": MambaCase(3, 24, 1, 128, dt_max=0.1),
    "p80_n128_g2_heads": MambaCase(8, 80, 2, 128),
    "p160_n128_g1": MambaCase(2, 160, 1, 128),
    # Tiles of 64 channels that straddle heads, and an odd number of them a group
    "p96_n128_g1": MambaCase(4, 96, 1, 128, gap=8),
    "p80_n64_g1": MambaCase(4, 80, 1, 64),
    "three_tiles": MambaCase(3, 64, 1, 128),
    "wide_batch": MambaCase(80, 64, 1, 128),  # wide enough for whole heads
    "wide_batch_p80": MambaCase(128, 80, 8, 128),
}
LENGTHS = {
    "grid_edges": Rows((63, 64, 65, 127, 128, 129, 9, 8, 72, 73), (0,) * 10),
    "resumed": Rows((63, 64, 65, 10, 3, 130), (1, 63, 64, 60, 65, 190)),
    "among_decode": Rows((1,) * 70 + (100, 0, 33), (5,) * 70 + (0, 7, 64)),
    "long": Rows((700,), (0,)),
}
LONG_ROWS = Rows((1500, 9, 700, 333, 1000, 2, 64, 65), (70, 0, 0, 128, 64, 5, 64, 0))
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
@pytest.mark.parametrize("rows", LENGTHS.values(), ids=LENGTHS)
def test_against_the_oracle(case, rows):
    arguments = scan_arguments(case, rows, torch.bfloat16)
    oracle, given = in_float64(arguments), on_device(arguments, "cuda")
    out = torch.full_like(given["x"].contiguous(), float("nan"))
    expected, actual = reference.ssm_scan_ref(**oracle), ops.ssm_scan(**given, out=out)
    assert relative_rms(actual, expected) < RMS_OF_Y
    assert_close(actual, expected, "y", tolerance=2.0**-7)
    slots = arguments["write_slots"].long()
    state, oracle_state = given["state"].cpu()[slots], oracle["state"][slots]
    assert relative_rms(state, oracle_state) < RMS_OF_STATE
    others = [slot for slot in range(given["state"].shape[0]) if slot not in slots.tolist()]
    assert_bit_equal(given["state"].cpu()[others], arguments["state"][others], "slots of nobody")


@pytest.mark.parametrize("raw", [-30.0, 19.9, 20.1, 90.0])
def test_steps_too_long_or_too_short_to_exponentiate(raw):
    """Decays of a chunk from e^0 to e^-5000."""
    arguments = scan_arguments(CASES["p64_n128_g8"], Rows((200,), (0,)), torch.bfloat16)
    arguments["dt"].fill_(raw)
    oracle, given = in_float64(arguments), on_device(arguments, "cuda")
    expected, actual = reference.ssm_scan_ref(**oracle), ops.ssm_scan(**given)
    assert relative_rms(actual, expected) < RMS_OF_Y


@each_case
@pytest.mark.parametrize("sizes", [(64, 1000), (192, 1000), (128, 64, 1000)], ids=str)
def test_cuts_on_the_chunk_grid_are_bit_equal(case, sizes):
    rows = Rows((262, 70, 196), (0, 64, 0))
    arguments = on_device(scan_arguments(case, rows, torch.bfloat16), "cuda")
    initial, whole = arguments["state"].clone(), ops.ssm_scan(**arguments)
    state, out = initial.clone(), torch.zeros_like(whole)
    begins = [0, 262, 332]
    for row in range(rows.num_rows):
        done = 0
        for size in sizes:
            count = min(size, rows.lengths[row] - done)
            if count == 0:
                break
            tokens = slice(begins[row] + done, begins[row] + done + count)
            out[tokens] = scan_alone(arguments, state, row, rows.starts[row] + done, tokens)
            done += count
    assert_bit_equal(out, whole, "y")
    assert_bit_equal(state, arguments["state"], "state")


@each_case
def test_outputs_before_any_cut_are_bit_equal(case):
    rows = Rows((150,), (0,))
    arguments = on_device(scan_arguments(case, rows, torch.bfloat16), "cuda")
    initial, whole = arguments["state"].clone(), ops.ssm_scan(**arguments)
    for cut in (9, 50, 63, 100, 149):
        before = scan_alone(arguments, initial.clone(), 0, 0, slice(0, cut))
        num_chunked = cut - cut % CHUNK_TOKENS if cut % CHUNK_TOKENS <= 8 else cut
        assert_bit_equal(before[:num_chunked], whole[:num_chunked], f"first {cut} tokens")


@each_case
@pytest.mark.parametrize(
    "rows", [Rows((90, 5, 1, 200, 64), (0, 3, 9, 64, 128)), LONG_ROWS], ids=["short", "long"]
)
def test_batch_mates_change_nothing(case, rows):
    """A batch chooses wider slices of a head than a row alone does, which several blocks may share by its chunks."""
    arguments = on_device(scan_arguments(case, rows, torch.bfloat16), "cuda")
    initial, whole = arguments["state"].clone(), ops.ssm_scan(**arguments)
    state, begin = initial.clone(), 0
    for row, count in enumerate(rows.lengths):
        tokens = slice(begin, begin + count)
        assert_bit_equal(
            scan_alone(arguments, state, row, rows.starts[row], tokens), whole[tokens], f"row {row}"
        )
        begin += count
    assert_bit_equal(state, arguments["state"], "state")


@each_case
def test_snapshots_are_what_rows_cut_there_end_with(case):
    """On every point of the grid and at each row's end; outputs and the rows' own states are as without them."""
    rows = Rows((262, 70, 196, 5), (0, 64, 128, 59))
    arguments = on_device(scan_arguments(case, rows, torch.bfloat16), "cuda")
    plain = {**arguments, "state": arguments["state"].clone()}
    initial, num_slots = plain["state"].clone(), len(plain["state"])
    ends = [start + length for start, length in zip(rows.starts, rows.lengths, strict=True)]
    taken = [sorted({*range(64 * (s // 64 + 1), e, 64), e}) for s, e in zip(rows.starts, ends, strict=True)]
    counts = [len(positions) for positions in taken]
    starts = [sum(counts[:row]) for row in range(rows.num_rows + 1)]
    slots = list(range(num_slots, num_slots + starts[-1]))
    lists = (starts, [p for positions in taken for p in positions], slots)
    snapshots = ops.Snapshots(*(torch.tensor(v, dtype=torch.int32, device="cuda") for v in lists))
    more = torch.full((starts[-1], *initial.shape[1:]), float("nan"), device="cuda")
    state = torch.cat([initial, more])
    out = ops.ssm_scan(**{**arguments, "state": state}, snapshots=snapshots)
    assert_bit_equal(out, ops.ssm_scan(**plain), "y")
    assert_bit_equal(state[:num_slots], plain["state"], "the rows' own states")
    begin = 0
    for row, positions in enumerate(taken):
        for position, slot in zip(positions, slots[starts[row] :], strict=False):
            cut = initial.clone()
            count = position - rows.starts[row]
            scan_alone(arguments, cut, row, rows.starts[row], slice(begin, begin + count))
            assert_bit_equal(state[slot], cut[int(arguments["write_slots"][row])], f"row {row} at {position}")
        begin += rows.lengths[row]


@pytest.mark.parametrize("case", [MambaCase(4, 64, 1, 128), MambaCase(4, 80, 1, 128)], ids=["p64", "p80"])
def test_slots_beyond_31_bits(case):
    """The byte and the element offset of the last slot are above 2^31."""
    rows = Rows((100, 1), (3, 7))
    arguments = on_device(scan_arguments(case, rows, torch.bfloat16), "cuda")
    near = {**arguments, "state": arguments["state"].clone()}
    per_slot = arguments["state"][0].numel()
    far_slot = 2**31 // per_slot + 1
    pool = torch.empty(far_slot + 2, *arguments["state"].shape[1:], device="cuda")
    pool[far_slot : far_slot + 2] = arguments["state"][1:3]
    far = {**arguments, "state": pool}
    for name in ("read_slots", "write_slots"):
        far[name] = arguments[name] + (far_slot - 1)
    assert_bit_equal(ops.ssm_scan(**far), ops.ssm_scan(**near), "y")
    assert_bit_equal(pool[far_slot : far_slot + 2], near["state"][1:3], "state")


@pytest.mark.xdist_group("gigabytes")
@pytest.mark.parametrize("case", [MambaCase(4, 64, 1, 128), MambaCase(4, 80, 1, 128)], ids=["p64", "p80"])
def test_tokens_beyond_31_bits(case):
    """The last tokens' inputs lie more than 2^31 elements behind the first's."""
    near = on_device(scan_arguments(case, Rows((70,), (0,)), torch.bfloat16), "cuda")
    far = {**near, "state": near["state"].clone()}
    for name in PER_TOKEN:
        tensor, stride = near[name], 2**25 + 64
        storage = torch.empty(
            (len(tensor) - 1) * stride + tensor[0].numel(), dtype=tensor.dtype, device="cuda"
        )
        far[name] = storage.as_strided(tensor.shape, (stride, *tensor.stride()[1:])).copy_(tensor)
    assert_bit_equal(ops.ssm_scan(**far), ops.ssm_scan(**near), "y")
    assert_bit_equal(far["state"], near["state"], "state")


def scan_alone(arguments, state, row, start, tokens):
    """Some tokens of one row, from and to its slot of state."""
    mine = {name: with_gaps_of(arguments[name], arguments[name][tokens]) for name in PER_TOKEN}
    count = tokens.stop - tokens.start
    bounds = {
        "query_start": torch.tensor([0, count], dtype=torch.int32, device="cuda"),
        "row_start": torch.tensor([start], dtype=torch.int32, device="cuda"),
    }
    slots = {name: arguments[name][row : row + 1] for name in ("read_slots", "write_slots")}
    return ops.ssm_scan(**{**arguments, **mine, **bounds, **slots, "state": state})


def with_gaps_of(like, tensor):
    return on_device({"x": with_gaps(tensor.cpu(), like.stride(0) - like[0].numel())}, "cuda")["x"]


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    error = actual.cpu().double() - expected
    return float(error.norm() / expected.norm())
