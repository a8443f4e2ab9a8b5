"""Attention over head dims, ratios of heads and block sizes that no other case has, and over as many rows as go."""

from __future__ import annotations

import pytest
import torch

from headway import ops
from headway.ops import reference
from tests.cases import AttentionCase, Rows, decode_rows
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import attention_arguments, in_float64, kv_write_arguments, on_device
from tests.ops.splits import alone

pytestmark = pytest.mark.gpu

# (query heads, key heads, head dim, block size)
SHAPES = [
    (10, 2, 72, 16),
    (6, 1, 80, 17),
    (28, 4, 112, 80),
    (12, 1, 160, 100),
    (16, 1, 224, 128),
    (2, 2, 256, 16),
    (16, 1, 256, 32),
    (6, 2, 192, 24),
    (9, 1, 120, 64),
    (5, 1, 128, 16),
    (7, 1, 128, 32),
    (24, 2, 128, 48),
    (9, 3, 128, 112),
    (11, 1, 128, 17),  # blocks that the copy engine does not take
    (12, 1, 64, 16),
    (5, 1, 64, 128),
    (16, 1, 88, 96),
    (3, 1, 248, 33),
    (4, 4, 104, 20),
    (16, 2, 16, 16),
    (8, 2, 8, 19),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
# Decode, drafts, empty rows, a prompt, chunks behind cached prefixes of odd lengths, the longest draft and one more.
MIXED = Rows((1, 4, 0, 130, 1, 33, 8, 9, 0), (0, 259, 7, 0, 700, 517, 1023, 64, 0))


def parts_of(arguments, rows):
    """Every row in a call of its own -> (its tokens, its output)."""
    for piece in alone(rows):
        tokens = piece.tokens.cuda()
        mine = {"q": arguments["q"][tokens], "rows": arguments["rows"][piece.row_indices]}
        bounds = {"max_query_len": piece.rows.max_query_len, "max_kv_len": piece.rows.max_kv_len}
        yield tokens, ops.paged_attention(**{**arguments, **mine, **bounds, **piece.bounds("cuda")})


@each_shape
@half_types
def test_mixed_steps(shape, dtype):
    case = AttentionCase(*shape, gap=8)
    arguments = attention_arguments(case, MIXED, dtype)
    expected = reference.paged_attention_ref(**in_float64(arguments))
    given = on_device(arguments, "cuda")
    out = torch.full(given["q"].shape, torch.nan, dtype=dtype, device="cuda")
    whole = ops.paged_attention(**given, out=out)
    assert_close(whole, expected, "mixed step")
    for tokens, part in parts_of(given, MIXED):
        assert_bit_equal(part, whole[tokens], "alone")


@each_shape
def test_keys_come_to_their_blocks(shape):
    """What kv_write stores is what attention sees; nothing else of the cache changes."""
    case = AttentionCase(*shape, gap=8)
    arguments = kv_write_arguments(case, MIXED, torch.bfloat16)
    expected, given = on_device(arguments, "cpu"), on_device(arguments, "cuda")
    reference.kv_write_ref(**expected)
    ops.kv_write(**given)
    for name in ("k_cache", "v_cache"):
        assert_bit_equal(given[name], expected[name], name)


@pytest.mark.parametrize(
    "shape", [(4, 2, 64, 16), (16, 1, 128, 16), (6, 1, 256, 32), (2, 1, 96, 16)], ids=str
)
@pytest.mark.parametrize("query_len", [1, 8, 9])
def test_as_many_rows_as_a_step_may_have(shape, query_len):
    """8,192 rows, of which the last ones have the bits that they have alone."""
    case, row = AttentionCase(*shape), Rows((query_len,), (40,))
    one = on_device(attention_arguments(case, row, torch.bfloat16), "cuda")
    num_rows = 8192
    many = one | {
        "q": one["q"].repeat(num_rows, 1, 1),
        "rows": one["rows"].repeat(num_rows),
        "query_start": torch.arange(num_rows + 1, dtype=torch.int32, device="cuda") * query_len,
        "row_start": one["row_start"].repeat(num_rows),
    }
    expected = ops.paged_attention(**one)
    out = ops.paged_attention(**many).view(num_rows, *expected.shape)
    for index in (0, 1, num_rows // 2, num_rows - 1):
        assert_bit_equal(out[index], expected, f"row {index}")
    assert bool((out == expected).all())


@pytest.mark.parametrize("query_len", [1, 9])
def test_one_row_more_is_refused(query_len):
    case = AttentionCase(4, 2, 64)
    many = on_device(attention_arguments(case, decode_rows(2, 3), torch.bfloat16), "cuda")
    num_rows = 8193
    zeros = torch.zeros(num_rows, dtype=torch.int32, device="cuda")
    many |= {
        "q": many["q"][:1].repeat(num_rows * query_len, 1, 1),
        "rows": zeros,
        "row_start": zeros,
        "query_start": torch.arange(num_rows + 1, dtype=torch.int32, device="cuda") * query_len,
        "max_query_len": query_len,
    }
    with pytest.raises(ValueError, match=r"paged_attention: .*8192"):
        ops.paged_attention(**many)


@half_types
@pytest.mark.parametrize("shape", [(4, 2, 64, 16), (16, 1, 128, 16), (6, 2, 96, 32)], ids=str)
def test_padding_rows_and_their_poison_disturb_nobody(shape, dtype):
    """Rows of the dummy, whose block holds NaN, among others; the cache's unused places hold NaN anyway."""
    rows = Rows((1, 1, 5, 20), (300, 0, 126, 70))
    arguments = on_device(attention_arguments(AttentionCase(*shape), rows, dtype), "cuda")
    alone_parts = list(parts_of(arguments, rows))
    arguments["rows"][1] = 0
    out = ops.paged_attention(**arguments)
    assert bool(out[1].isnan().all())  # its only key is poison
    for index, (tokens, part) in enumerate(alone_parts):
        if index != 1:
            assert_bit_equal(out[tokens], part, f"row {index}")


@pytest.mark.parametrize("query_len", [1, 8, 300])
@pytest.mark.parametrize("shape", [(4, 2, 64, 16), (16, 1, 128, 16), (6, 2, 96, 32)], ids=str)
def test_extreme_keys(shape, query_len):
    """Scores all equal, scores whose exponentials no float holds, and huge values."""
    case, rows = AttentionCase(*shape), Rows((query_len,), (70,))
    arguments = attention_arguments(case, rows, torch.bfloat16)
    for change in (
        lambda a: a | {"k_cache": torch.where(a["k_cache"].isnan(), a["k_cache"], 0)},
        lambda a: a | {"k_cache": a["k_cache"] * 1e3, "scale": 1.0},
        lambda a: a | {"v_cache": a["v_cache"].sign() * 1e35},
    ):
        changed = change(arguments)
        expected = reference.paged_attention_ref(**in_float64(changed))
        actual = ops.paged_attention(**on_device(changed, "cuda"))
        assert bool(actual.isfinite().all())
        limit = float(expected.abs().max())
        assert_close(actual.double() / limit, expected / limit, "extreme", tolerance=2.0**-7)


@pytest.mark.parametrize("shape", [(4, 2, 64, 16), (16, 1, 128, 16), (6, 2, 96, 32)], ids=str)
@pytest.mark.parametrize("max_kv_len", [1 << 20, 2**31 - 1])
def test_bounds_far_beyond_the_truth(shape, max_kv_len):
    """As a captured step of a model with a million positions has them: every bit is that of the exact bound."""
    arguments = on_device(attention_arguments(AttentionCase(*shape), MIXED, torch.bfloat16), "cuda")
    exact = ops.paged_attention(**arguments)
    arguments["max_kv_len"], arguments["max_query_len"] = max_kv_len, 4096
    assert_bit_equal(ops.paged_attention(**arguments), exact, "loose bounds")


@pytest.mark.parametrize("shape", [(8, 1, 64, 16), (16, 1, 128, 128)], ids=str)
def test_contexts_of_more_than_a_hundred_thousand_tokens(shape):
    """Of a row that decodes and of a chunk; the oracle runs on the GPU, too."""
    rows = Rows((1, 20), (131_072, 40_000))
    given = on_device(attention_arguments(AttentionCase(*shape), rows, torch.bfloat16), "cuda")
    wide = {name: given[name].double() for name in ("q", "k_cache", "v_cache")}
    expected = reference.paged_attention_ref(**(given | wide))
    assert_close(ops.paged_attention(**given), expected, "long contexts")
