"""Rotary, cache writes and paged attention against the float64 oracle; pieces are bit-equal; poison stays out."""

from __future__ import annotations

import pytest
import torch

from headway import ops
from headway.ops import reference
from tests.cases import ATTENTION_CASES, ROWS, Rows
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import attention_arguments, in_float64, kv_write_arguments, on_device, rotary_arguments
from tests.ops.splits import cut, pieces_of

each_case = pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES)
each_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


@each_case
@each_rows
def test_rotary(case, rows, dtype, device):
    arguments = rotary_arguments(case, rows, dtype)
    oracle, given = in_float64(arguments), on_device(arguments, device)
    reference.rotary_ref(**oracle)
    ops.rotary(**given)
    for name in ("q", "k"):
        assert_close(given[name], oracle[name], f"rotary {name}")
        untouched = slice(case.rotary_dim or case.head_dim, None)
        assert_bit_equal(given[name][..., untouched], arguments[name][..., untouched], f"rotary {name}: rest")


@each_case
@each_rows
def test_kv_write(case, rows, dtype, device):
    arguments = kv_write_arguments(case, rows, dtype)
    expected = {name: value.clone() for name, value in arguments.items()}
    reference.kv_write_ref(**expected)
    given = on_device(arguments, device)
    ops.kv_write(**given)
    for name in ("k_cache", "v_cache"):
        assert_bit_equal(given[name], expected[name], name)


@each_case
@each_rows
def test_paged_attention(case, rows, dtype, device):
    arguments = attention_arguments(case, rows, dtype)
    expected = reference.paged_attention_ref(**in_float64(arguments))
    assert_close(ops.paged_attention(**on_device(arguments, device)), expected, "paged_attention")


@each_case
@pytest.mark.parametrize("rows", [ROWS["mixed"], ROWS["tile_edges"]], ids=["mixed", "tile_edges"])
def test_pieces_are_bit_equal(case, rows, dtype, device):
    """The cache holds all keys already; a query must not see beyond its position however the step is cut.

    On a GPU, 16-bit rows of few queries and of many take kernels with different summation trees: there, pieces agree to
    the bit with pieces that the same kernel takes, and closely with the others.
    """
    arguments = on_device(attention_arguments(case, rows, dtype), device)
    whole = ops.paged_attention(**arguments)
    for title, pieces in pieces_of(rows).items():
        out = torch.zeros_like(whole)
        for piece in pieces:
            tokens = piece.tokens.to(device)
            mine = {"q": arguments["q"][tokens], "rows": arguments["rows"][piece.row_indices]}
            bounds = {"max_query_len": piece.rows.max_query_len, "max_kv_len": piece.rows.max_kv_len}
            out[tokens] = ops.paged_attention(**{**arguments, **mine, **bounds, **piece.bounds(device)})
        if device == "cuda" and dtype != torch.float32 and title != "alone":
            assert_close(out, whole.double(), f"paged_attention {title}")
        else:
            assert_bit_equal(out, whole, f"paged_attention {title}")


def test_drafts_are_bit_equal_to_single_tokens(dtype, device):
    """Rows of up to 8 queries, verified at once or one at a time, over a few keys and over several thousand."""
    rows = Rows((8, 3, 1, 5), (4090, 126, 1023, 3))
    arguments = on_device(attention_arguments(ATTENTION_CASES["regular"], rows, dtype), device)
    whole = ops.paged_attention(**arguments)
    out = torch.zeros_like(whole)
    for piece in cut(rows, (1,)):
        tokens = piece.tokens.to(device)
        mine = {"q": arguments["q"][tokens], "rows": arguments["rows"][piece.row_indices]}
        bounds = {"max_query_len": piece.rows.max_query_len, "max_kv_len": piece.rows.max_kv_len}
        out[tokens] = ops.paged_attention(**{**arguments, **mine, **bounds, **piece.bounds(device)})
    assert_bit_equal(out, whole, "drafts")


def test_scores_far_apart_do_not_overflow(dtype, device):
    """Scores of a thousand: the softmax is taken relative to the running maximum."""
    case, rows = ATTENTION_CASES["regular"], ROWS["mixed"]
    arguments = attention_arguments(case, rows, dtype)
    arguments["scale"] = 100.0
    expected = reference.paged_attention_ref(**in_float64(arguments))
    tolerance = 1e-3 if dtype == torch.float32 else None  # a score's own rounding, times a thousand
    assert_close(
        ops.paged_attention(**on_device(arguments, device)), expected, "far apart", tolerance=tolerance
    )


def test_bounds_may_be_loose(dtype, device):
    """max_query_len and max_kv_len are upper bounds, not the truth."""
    arguments = on_device(attention_arguments(ATTENTION_CASES["regular"], ROWS["mixed"], dtype), device)
    exact = ops.paged_attention(**arguments)
    arguments["max_query_len"], arguments["max_kv_len"] = 500, 4000
    assert_bit_equal(ops.paged_attention(**arguments), exact, "loose bounds")
