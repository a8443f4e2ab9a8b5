"""Products over packed weights against float64, alone against batched, and what they must not touch."""

from __future__ import annotations

import pytest
import torch

from headway import ops
from headway.ops import reference
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import normal

# (tokens, inputs, outputs): every tile of tokens, panels that are not full, one of each
SHAPES = [
    (1, 1, 1),
    (2, 7, 15),
    (3, 16, 16),
    (5, 33, 17),
    (8, 64, 64),
    (12, 40, 129),
    (31, 96, 80),
    (70, 257, 200),
]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return request.param


@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(shape: tuple[int, int, int], has_bias: bool) -> None:
    num_tokens, num_inputs, num_outputs = shape
    x, weight = normal(num_tokens, num_inputs, seed=1), normal(num_outputs, num_inputs, seed=2)
    bias = normal(num_outputs, seed=3) if has_bias else None
    packed = ops.pack_linear(weight)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    oracle = reference.linear_ref(x.double(), packed, None if bias is None else bias.double())
    assert_close(oracle, expected, "linear_ref", tolerance=1e-12)
    assert_close(ops.linear(x, packed, bias), expected, "linear")


def test_a_token_alone_is_bit_equal(shape: tuple[int, int, int]) -> None:
    num_tokens, num_inputs, num_outputs = shape
    x, packed = (
        normal(num_tokens, num_inputs, seed=1),
        ops.pack_linear(normal(num_outputs, num_inputs, seed=2)),
    )
    together = ops.linear(x, packed)
    for token in range(num_tokens):
        assert_bit_equal(
            ops.linear(x[token : token + 1], packed), together[token : token + 1], f"token {token}"
        )


def test_strided_tokens_and_what_lies_between(shape: tuple[int, int, int]) -> None:
    num_tokens, num_inputs, num_outputs = shape
    wide_x, wide_out = (
        normal(num_tokens, num_inputs + 3, seed=1),
        torch.full((num_tokens, num_outputs + 5), 7.0),
    )
    x, out = wide_x[:, :num_inputs], wide_out[:, :num_outputs]
    packed = ops.pack_linear(normal(num_outputs, num_inputs, seed=2))
    expected = ops.linear(x.contiguous(), packed)
    assert ops.linear(x, packed, out=out) is out
    assert_bit_equal(out, expected, "out")
    assert (wide_out[:, num_outputs:] == 7.0).all()


def test_the_product_is_added(shape: tuple[int, int, int]) -> None:
    num_tokens, num_inputs, num_outputs = shape
    x, packed = (
        normal(num_tokens, num_inputs, seed=1),
        ops.pack_linear(normal(num_outputs, num_inputs, seed=2)),
    )
    before = normal(num_tokens, num_outputs, seed=4)
    total = ops.linear(x, packed, out=before.clone(), is_added=True)
    assert_bit_equal(total, before + ops.linear(x, packed), "total")


def test_no_tokens() -> None:
    assert ops.linear(torch.empty(0, 8), ops.pack_linear(torch.ones(4, 8))).shape == (0, 4)


def test_every_simd_level_agrees(shape: tuple[int, int, int]) -> None:
    from headway import _cpu

    num_tokens, num_inputs, num_outputs = shape
    x, packed = (
        normal(num_tokens, num_inputs, seed=1),
        ops.pack_linear(normal(num_outputs, num_inputs, seed=2)),
    )
    expected = reference.linear_ref(x.double(), packed)
    levels = _cpu.simd_levels()
    try:
        for level in levels:
            _cpu.set_simd_level(level)
            assert_close(ops.linear(x, packed), expected, level)
    finally:
        _cpu.set_simd_level(levels[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(2, 7)}, "in = 8"),
        ({"x": torch.ones(2, 8, dtype=torch.float64)}, "x must be torch.float32"),
        ({"bias": torch.ones(3)}, "bias"),
        ({"out": torch.ones(2, 5)}, r"shape \[2, 4\]"),
        ({"is_added": True}, "out must be given"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    given = {"x": torch.ones(2, 8), "matrix": ops.pack_linear(torch.ones(4, 8)), **arguments}
    with pytest.raises(ValueError, match=message):
        ops.linear(**given)


# (inputs, outputs): fewer columns than a block has warps, several groups of rows a block, columns that end in a chunk;
# beyond 16 MiB few rows a block (one tile, three, five, six; columns that end in a box, between panels, in a panel),
# then many: multiprocessors without a block, two groups of rows, columns that end in a panel
SKINNY_SHAPES = [
    (8, 1),
    (64, 7),
    (264, 2112),
    (16_448, 520),
    (3712, 2688),
    (4480, 4480),
    (1536, 5941),
    (4488, 2000),
    (1000, 22656),
    (2688, 10304),
    (264, 40_001),
    (72, 117_000),
]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SKINNY_SHAPES, ids=str)
@pytest.mark.parametrize("skinny_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_skinny_linear(sizes: tuple[int, int], skinny_dtype: torch.dtype) -> None:
    """Against float64, with a bias and on top of what was there, between poisoned columns; alone to the bit."""
    num_inputs, num_outputs = sizes
    weight = normal(num_outputs, num_inputs, seed=2, dtype=skinny_dtype, scale=num_inputs**-0.5).cuda()
    bias = normal(num_outputs, seed=3, dtype=skinny_dtype).cuda()
    for num_tokens in (1, 2, 7, 8, 9, 16, 17, 32, 40, 64, 65):
        x = torch.full((num_tokens, num_inputs + 8), float("nan"), dtype=skinny_dtype, device="cuda")
        x = x[:, :num_inputs].copy_(normal(num_tokens, num_inputs, seed=1, dtype=skinny_dtype))
        expected = x.double() @ weight.double().t()
        assert_close(ops.skinny_linear(x, weight), expected, "product")
        plain = ops.skinny_linear(x, weight, bias)
        assert_close(plain, expected + bias.double(), "with bias")
        wide = torch.full((num_tokens, num_outputs + 3), 7.0, dtype=skinny_dtype, device="cuda")
        ops.skinny_linear(x, weight, bias, out=wide[:, :num_outputs], is_added=True)
        assert_close(wide[:, :num_outputs], expected + bias.double() + 7, "added")
        assert bool((wide[:, num_outputs:] == 7).all())
        for token in {0, num_tokens // 2, num_tokens - 1}:
            alone = ops.skinny_linear(x[token : token + 1], weight, bias)
            assert_bit_equal(alone, plain[token : token + 1], f"token {token}")
