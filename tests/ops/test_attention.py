"""Rotary, cache writes and paged attention against the float64 oracle; pieces are bit-equal; poison stays out."""

from __future__ import annotations

import pytest
import torch

from headway import ops
from headway.ops import reference
from tests.cases import ATTENTION_CASES, ROWS, AttentionCase, Rows
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import attention_arguments, in_float64, kv_write_arguments, on_device, rotary_arguments
from tests.ops.splits import alone, cut, pieces_of

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


DRAFT_CASES = {
    "regular": ATTENTION_CASES["regular"],
    "sixteen_heads_a_key": AttentionCase(32, 2, 128),
    "forty_heads_a_key": AttentionCase(40, 1, 128, block_size=32),
}


@pytest.mark.parametrize("case", DRAFT_CASES.values(), ids=DRAFT_CASES)
def test_drafts_are_bit_equal_to_single_tokens(case, dtype, device):
    """Rows of up to 8 queries, verified at once or one at a time, over a few keys and over several thousand."""
    rows = Rows((8, 3, 1, 5), (4090, 126, 1023, 3))
    arguments = on_device(attention_arguments(case, rows, dtype), device)
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


LONG_CASES = {
    "heads_of_64": AttentionCase(8, 2, 64, block_size=128),
    "sixteen_heads_a_key": AttentionCase(32, 2, 128),
    "padded": AttentionCase(6, 2, 96, block_size=32, gap=8),
    "heads_of_192": AttentionCase(4, 2, 192, block_size=64),
    "heads_of_256": AttentionCase(4, 1, 256),
}


@pytest.mark.parametrize("case", LONG_CASES.values(), ids=LONG_CASES)
def test_long_contexts(case, dtype, device):
    """Keys of many blocks of work, ragged; alone, a row gives the same bits."""
    rows = Rows((1, 1, 3, 1, 1), (5000, 2047, 700, 255, 2048))
    arguments = attention_arguments(case, rows, dtype)
    expected = reference.paged_attention_ref(**in_float64(arguments))
    given = on_device(arguments, device)
    whole = ops.paged_attention(**given)
    assert_close(whole, expected, "long contexts")
    for piece in alone(rows):
        mine = {"q": given["q"][piece.tokens.to(device)], "rows": given["rows"][piece.row_indices]}
        bounds = {"max_query_len": piece.rows.max_query_len, "max_kv_len": piece.rows.max_kv_len}
        out = ops.paged_attention(**{**given, **mine, **bounds, **piece.bounds(device)})
        assert_bit_equal(out, whole[piece.tokens.to(device)], "alone")


STEP_CASES = {
    "sixteen_heads_a_key": AttentionCase(32, 2, 128),
    "four_heads_a_key": AttentionCase(8, 2, 128, block_size=128),
    "one_head_a_key": AttentionCase(3, 3, 128, block_size=48),
    "heads_of_64": AttentionCase(16, 1, 64, block_size=32),
    "heads_of_96": AttentionCase(10, 2, 96, block_size=64, gap=8),
    "heads_of_256": AttentionCase(8, 1, 256),
}


@pytest.mark.parametrize("case", STEP_CASES.values(), ids=STEP_CASES)
def test_lengths_around_pieces_of_work(case, dtype, device):
    """One query and three, over one key, and one less, as many and one more than a tile, a step and a span hold."""
    kv_lens = [n + d for n in (64, 128, 256, 1024, 2048) for d in (-1, 0, 1)]
    rows = Rows((1,) * 16 + (0,) + (3,) * 15, (0, *(n - 1 for n in kv_lens), 0, *(n - 3 for n in kv_lens)))
    arguments = attention_arguments(case, rows, dtype)
    expected = reference.paged_attention_ref(**in_float64(arguments))
    assert_close(ops.paged_attention(**on_device(arguments, device)), expected, "around pieces of work")


PROMPT_CASES = {
    "heads_of_64": AttentionCase(8, 2, 64, block_size=128),
    "sixteen_heads_a_key": AttentionCase(32, 2, 128),
    "one_head_a_key": AttentionCase(2, 2, 128, block_size=32, gap=8),
    "odd_blocks": AttentionCase(6, 2, 128, block_size=48),
    "heads_of_96": AttentionCase(3, 1, 96, block_size=64),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", PROMPT_CASES.values(), ids=PROMPT_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_prompts_are_bit_equal_to_their_pieces(case, dtype):
    """Over several tiles of keys, with and without cached ones; no piece changes hands between kernels."""
    rows = Rows((300, 0, 9, 140, 1), (0, 5, 250, 500, 40))
    arguments = attention_arguments(case, rows, dtype)
    expected = reference.paged_attention_ref(**in_float64(arguments))
    given = on_device(arguments, "cuda")
    whole = ops.paged_attention(**given)
    assert_close(whole, expected, "prompts")
    for title, pieces in {
        "alone": alone(rows),
        "cut": cut(rows, (100,)),
        "odd": cut(rows, (51, 71, 89)),
    }.items():
        out = torch.zeros_like(whole)
        for piece in pieces:
            tokens = piece.tokens.cuda()
            mine = {"q": given["q"][tokens], "rows": given["rows"][piece.row_indices]}
            bounds = {"max_query_len": piece.rows.max_query_len, "max_kv_len": piece.rows.max_kv_len}
            out[tokens] = ops.paged_attention(**{**given, **mine, **bounds, **piece.bounds("cuda")})
        assert_bit_equal(out, whole, f"prompts {title}")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_rows", "num_queries", "kv_len", "case"),
    [
        (2600, 1, 2100, AttentionCase(32, 2, 128)),  # more partial results than there is room for
        (200, 4, 2100, AttentionCase(32, 2, 128)),
        (1100, 4, 2100, AttentionCase(32, 2, 128)),
        (200, 8, 2100, AttentionCase(32, 2, 128)),
        (132, 1, 6200, AttentionCase(32, 2, 128)),  # as many rows as blocks
        (132, 1, 6200, AttentionCase(32, 2, 96)),
        (132, 3, 6200, AttentionCase(40, 8, 128, block_size=32)),
        (64, 4, 4100, AttentionCase(32, 2, 128)),  # a row and key head a block, in turns
        (198, 3, 2100, AttentionCase(32, 2, 128)),  # three, each of an odd number of spans
    ],
)
def test_many_rows_get_what_one_gets(num_rows, num_queries, kv_len, case):
    """Where a block takes whole spans of keys or whole rows; to the bit."""
    row = Rows((num_queries,), (kv_len - num_queries,))
    one = on_device(attention_arguments(case, row, torch.bfloat16), "cuda")
    many = one | {
        "q": one["q"].repeat(num_rows, 1, 1),
        "rows": one["rows"].repeat(num_rows),
        "query_start": torch.arange(num_rows + 1, dtype=torch.int32, device="cuda") * num_queries,
        "row_start": one["row_start"].repeat(num_rows),
    }
    expected = ops.paged_attention(**one).repeat(num_rows, 1, 1)
    assert_bit_equal(ops.paged_attention(**many), expected, "many rows")


@pytest.mark.gpu
def test_rows_in_turns_get_what_one_gets():
    """About one row and key head a block, whose halves take a row's spans in turns; rows differ in their spans."""
    case = AttentionCase(32, 2, 128)
    kv_lens = [1900 + 37 * r % 240 for r in range(66)]
    rows = Rows((1,) * len(kv_lens), tuple(n - 1 for n in kv_lens))
    given = on_device(attention_arguments(case, rows, torch.bfloat16), "cuda")
    whole = ops.paged_attention(**given)
    for piece in alone(rows):
        mine = {"q": given["q"][piece.tokens.cuda()], "rows": given["rows"][piece.row_indices]}
        bounds = {"max_query_len": 1, "max_kv_len": piece.rows.max_kv_len}
        out = ops.paged_attention(**{**given, **mine, **bounds, **piece.bounds("cuda")})
        assert_bit_equal(out, whole[piece.tokens.cuda()], "alone")
