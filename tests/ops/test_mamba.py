"""The convolution and the scan against the float64 oracle; chunked, alone and batched are bit-equal."""

from __future__ import annotations

import pytest
import torch

from headway import ops
from headway.ops import reference
from tests.cases import MAMBA_CASES, NAN, ROWS, Rows
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import conv_arguments, in_float64, normal, on_device, scan_arguments, with_gaps
from tests.ops.splits import pieces_of

OPS = {
    "conv": (ops.causal_conv1d, reference.causal_conv1d_ref, conv_arguments),
    "scan": (ops.ssm_scan, reference.ssm_scan_ref, scan_arguments),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: None}
IN_CHUNKS = 2.0**-7  # bf16 operands: a product of rounded factors, rounded
PER_TOKEN = {"conv": ("x",), "scan": ("x", "B", "C", "dt")}
each_op = pytest.mark.parametrize("name", OPS)
each_case = pytest.mark.parametrize("case", MAMBA_CASES.values(), ids=MAMBA_CASES)


@each_op
@each_case
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_against_the_oracle(name, case, rows, dtype, device):
    op, ref, build = OPS[name]
    arguments = build(case, rows, dtype)
    oracle, given = in_float64(arguments), on_device(arguments, device)
    expected, actual = ref(**oracle), op(**given)
    in_chunks = name == "scan" and runs_in_chunks(case, rows, dtype, device)
    assert_close(actual, expected, name, tolerance=IN_CHUNKS if in_chunks else TOLERANCE[dtype])
    slots = arguments["write_slots"].long()
    state, oracle_state = given["state"].cpu(), oracle["state"]
    assert_close(
        state[slots], oracle_state[slots], f"{name} state", tolerance=IN_CHUNKS if in_chunks else 1e-5
    )
    others = [slot for slot in range(state.shape[0]) if slot not in slots.tolist()]
    assert_bit_equal(state[others], arguments["state"][others], f"{name}: slots of nobody")


@each_op
@each_case
@pytest.mark.parametrize("rows", [ROWS["mixed"], ROWS["tile_edges"]], ids=["mixed", "tile_edges"])
def test_pieces_are_bit_equal(name, case, rows, dtype, device):
    if name == "scan" and runs_in_chunks(case, rows, dtype, device):
        pytest.skip("in chunks, cuts on the chunk grid only are bit-equal: test_scan_chunks.py")
    op, _, build = OPS[name]
    arguments = on_device(build(case, rows, dtype), device)
    initial = arguments["state"].clone()
    whole = op(**arguments)
    final = arguments["state"]
    for title, pieces in pieces_of(rows).items():
        state, out = initial.clone(), torch.zeros_like(whole)
        for piece in pieces:
            tokens = piece.tokens.to(device)
            mine = {
                key: with_gaps_of(arguments[key], arguments[key][tokens], device) for key in PER_TOKEN[name]
            }
            slots = arguments["read_slots"][piece.row_indices]
            out[tokens] = op(
                **{**arguments, **mine, **piece.bounds(device)}
                | {"state": state, "read_slots": slots, "write_slots": slots.clone()}
            )
        assert_bit_equal(out, whole, f"{name} {title}")
        assert_bit_equal(state, final, f"{name} {title}: state")


def runs_in_chunks(case, rows, dtype, device) -> bool:
    """Whether the scan takes the tensor cores for some of these rows: csrc/cuda/ssm_scan.cu."""
    fits = case.state_size in (64, 128, 256) and case.head_dim % 8 == 0
    return device == "cuda" and dtype == torch.bfloat16 and fits and rows.max_query_len > 8


def with_gaps_of(like: torch.Tensor, tensor: torch.Tensor, device: str) -> torch.Tensor:
    """tensor with like's gaps between tokens, so that both take the same path."""
    gap = like.stride(0) - like[0].numel()
    return on_device({"x": with_gaps(tensor.cpu(), gap)}, device)["x"]


@each_op
def test_a_snapshot_is_read_and_not_written(name, dtype, device):
    """Two rows start from one slot and write to slots of their own; a row without tokens copies."""
    op, _, build = OPS[name]
    case, rows = MAMBA_CASES["regular"], Rows((4, 0, 3), (8, 8, 8))
    arguments = on_device(build(case, rows, dtype), device)
    snapshot = arguments["state"][1].clone()
    arguments["read_slots"] = torch.full_like(arguments["read_slots"], 1)
    arguments["write_slots"] = torch.tensor([2, 3, 4], dtype=torch.int32, device=device)
    op(**arguments)
    state = arguments["state"]
    assert_bit_equal(state[1], snapshot, f"{name}: snapshot")
    assert_bit_equal(state[3], snapshot, f"{name}: copy")
    assert not torch.equal(state[2], snapshot)
    assert not torch.isnan(state[2:5]).any()


@each_op
def test_a_fresh_row_without_tokens_writes_zeros(name, dtype, device):
    op, _, build = OPS[name]
    rows = Rows((0, 2), (0, 0))
    arguments = on_device(build(MAMBA_CASES["odd"], rows, dtype), device)
    arguments["state"].fill_(NAN)
    op(**arguments)
    slot = int(arguments["write_slots"][0])
    assert_bit_equal(arguments["state"][slot], torch.zeros_like(arguments["state"][slot]), f"{name}: zeros")


@each_op
def test_padding_rows_share_the_dummy_slot(name, dtype, device):
    """Several rows of slot 0 disturb nobody else."""
    op, _, build = OPS[name]
    rows = Rows((1, 1, 1, 1), (5, 0, 0, 0))
    arguments = on_device(build(MAMBA_CASES["regular"], rows, dtype), device)
    arguments["read_slots"] = torch.tensor([4, 0, 0, 0], dtype=torch.int32, device=device)
    arguments["write_slots"] = arguments["read_slots"].clone()
    alone = {**arguments, "state": arguments["state"].clone()}
    out = op(**arguments)
    bounds = {"query_start": torch.tensor([0, 1]), "row_start": torch.tensor([5])}
    alone |= {key: value.int().to(device) for key, value in bounds.items()}
    alone |= {key: alone[key][:1] for key in (*PER_TOKEN[name], "read_slots", "write_slots")}
    assert_bit_equal(op(**alone), out[:1], name)
    assert_bit_equal(alone["state"][4], arguments["state"][4], f"{name} state")


def scalar_scan(count: int, **changes: torch.Tensor) -> torch.Tensor:
    """The scan of count heads of one channel and one state, x = B = C = 1, D = 0: y is a function of dt and A."""
    ones = torch.ones(1, count, 1)
    arguments = {
        "x": ones,
        "B": ones[:, :1],
        "C": ones[:, :1],
        "dt": torch.zeros(1, count),
        "A": -torch.ones(count),
        "D": torch.zeros(count),
        "dt_bias": torch.zeros(count),
        "state": torch.zeros(2, count, 1, 1),
        "query_start": torch.tensor([0, 1], dtype=torch.int32),
        "row_start": torch.zeros(1, dtype=torch.int32),
        "read_slots": torch.ones(1, dtype=torch.int32),
        "write_slots": torch.ones(1, dtype=torch.int32),
    }
    return ops.ssm_scan(**on_device({**arguments, **changes}, "cpu")).cpu().flatten()


def ulps(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error in units of the exact value's last float32 place."""
    spacing = torch.finfo(torch.float32).eps * 2.0 ** exact.abs().log2().floor()
    return float(((actual.double() - exact).abs() / spacing).max())


def test_softplus_is_accurate(cpu_level):
    raw = torch.cat([torch.linspace(-60, 60, 20001), normal(5000, scale=3.0)])
    exact = torch.log1p(torch.exp(raw.double()))
    assert ulps(scalar_scan(len(raw), dt=raw[None]), exact) <= 3.0


def test_decay_is_accurate(cpu_level):
    """The state decays by exp(A dt); nothing flows in because x = 0."""
    rates = -torch.cat([torch.linspace(0, 80, 20001), torch.rand(5000)])
    count = len(rates)
    changes = {
        "x": torch.zeros(1, count, 1),
        "dt": torch.full((1, count), 32.0),  # above 20, softplus is the identity
        "A": rates / 32.0,
        "state": torch.ones(2, count, 1, 1),
        "row_start": torch.ones(1, dtype=torch.int32),
    }
    exact = torch.exp(rates.double())
    assert ulps(scalar_scan(count, **changes), exact) <= 2.0
