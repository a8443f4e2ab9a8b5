"""Routing and experts where kernels change hands, at their limits and beyond, and with values that are no numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headway import ops
from headway.ops import reference
from tests.cases import MOE_CASES, MoeCase, RouteCase
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import moe_arguments, normal, on_device, route_arguments

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
half_types = pytest.mark.parametrize("half_dtype", HALF_TYPES.values(), ids=HALF_TYPES)
# Widths that end in a fragment, one expert, every expert of many, odd sizes.
SHAPES = {
    "gated": MoeCase(0, 136, 72, 12, 3, True, "silu"),
    "relu2": MoeCase(0, 200, 120, 33, 6, False, "relu2"),
    "one_expert": MoeCase(0, 64, 8, 1, 1, True, "gelu"),
    "smallest": MoeCase(0, 8, 8, 4, 2, False, "relu2"),
    "all_experts": MoeCase(0, 48, 40, 40, 40, True, "silu"),
    "odd": MoeCase(0, 62, 45, 6, 2, True, "silu"),
}
CROWDS = {
    "too_many": MoeCase(0, 32, 16, 1100, 4, True, "silu"),
    "most": MoeCase(0, 32, 16, 1024, 22, False, "relu2"),
    "most_grouped": MoeCase(0, 32, 16, 1023, 6, False, "relu2"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 9, 63, 64, 65, 255, 256, 257, 600])
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
@half_types
def test_every_number_of_tokens(case, num_tokens, half_dtype):
    assert_experts_are_right(case, num_tokens, half_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [2, 64, 257, 600])
@pytest.mark.parametrize("case", CROWDS.values(), ids=CROWDS)
@half_types
def test_crowds_of_experts(case, num_tokens, half_dtype):
    """More than the kernels take, as many, and as many as torch's grouped product takes."""
    assert_experts_are_right(case, num_tokens, half_dtype)


def assert_experts_are_right(case: MoeCase, num_tokens: int, half_dtype: torch.dtype) -> None:
    arguments = moe_arguments(dataclasses.replace(case, num_tokens=num_tokens), half_dtype)
    given = on_device(arguments, "cuda")
    wide = {name: value.double() for name, value in given.items() if isinstance(value, torch.Tensor)}
    expected = reference.moe_experts_ref(
        **(given | wide)
    )  # on the GPU: the oracle of 1,100 experts takes its time
    tolerance = 3 * (2.0**-8 if half_dtype == torch.bfloat16 else 2.0**-11)
    assert_close(ops.moe_experts(**given), expected, "moe_experts", tolerance=tolerance)


@pytest.mark.gpu
@half_types
def test_steps_of_many_tokens_can_be_captured(half_dtype):
    """A step of more tokens than the small-batch kernels take waits for no device."""
    arguments = on_device(
        moe_arguments(dataclasses.replace(SHAPES["gated"], num_tokens=600), half_dtype), "cuda"
    )
    expected = ops.moe_experts(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.moe_experts(**arguments)
    graph.replay()
    torch.cuda.synchronize()
    assert_bit_equal(out, expected, "replayed")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["gated", "relu2", "few_experts"])
def test_a_token_that_is_no_number_spoils_itself_alone(name, value, dtype, device):
    arguments = on_device(moe_arguments(MOE_CASES[name], dtype), device)
    expected = ops.moe_experts(**arguments)
    arguments["x"][1] = value
    arguments["routing"].weights[1] = value
    actual = ops.moe_experts(**arguments)
    others = [token for token in range(MOE_CASES[name].num_tokens) if token != 1]
    assert_bit_equal(actual[others], expected[others], "the other tokens")
    assert not bool(actual[1].isfinite().any())


ROUTES = {
    "one_expert": RouteCase(3, 1, 1),
    "odd": RouteCase(5, 33, 7, {"score": "sigmoid"}, has_bias=True),
    "most": RouteCase(4, 1024, 40, {"score": "sigmoid", "scale": 2.5}, has_bias=True),
    "most_groups": RouteCase(6, 128, 8, {"num_groups": 32, "topk_group": 9}, has_bias=True),
    "ties_everywhere": RouteCase(7, 65, 64, is_tied=True),
    "ties_of_groups": RouteCase(9, 64, 6, {"num_groups": 8, "topk_group": 3}, is_tied=True),
}


@pytest.mark.parametrize("case", ROUTES.values(), ids=ROUTES)
def test_route_at_its_limits(case, device):
    arguments = route_arguments(case)
    expected = reference.route_ref(**arguments)
    actual = ops.route(**on_device(arguments, device))
    assert_bit_equal(actual.expert_ids, expected.expert_ids, "expert ids")
    assert_close(actual.weights, expected.weights, "weights")


@pytest.mark.parametrize(
    "value",
    [float("nan"), -float("nan"), float("inf"), -float("inf")],
    ids=["nan", "minus_nan", "inf", "minus_inf"],
)
@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("case", ROUTES.values(), ids=ROUTES)
def test_logits_that_are_no_numbers_choose_experts_that_exist(case, is_whole, value, device):
    """And change no other token's choice: whatever became of a row, its experts' weights must be there to be read."""
    arguments = on_device(route_arguments(case), device)
    expected = ops.route(**arguments)
    arguments["logits"][1, slice(None) if is_whole else slice(0, None, 2)] = value
    actual = ops.route(**arguments)
    assert bool(((actual.expert_ids >= 0) & (actual.expert_ids < case.num_experts)).all())
    others = [token for token in range(case.num_tokens) if token != 1]
    assert_bit_equal(actual.expert_ids[others], expected.expert_ids[others], "expert ids")
    assert_bit_equal(actual.weights[others], expected.weights[others], "weights")


@pytest.mark.gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"num_groups": 8, "topk_group": 2}], ids=["flat", "groups"])
def test_hidden_states_that_are_no_numbers_choose_experts_that_exist(options, value, dtype):
    hidden, router = normal(11, 264).to(dtype).cuda(), normal(40, 264).cuda()
    num_done = torch.zeros(ops.NUM_ROUTE_GROUPS, dtype=torch.int32, device="cuda")
    expected = ops.route_hidden(hidden, router, 4, num_done, **options)
    hidden[9] = value
    actual = ops.route_hidden(hidden, router, 4, num_done, **options)
    assert bool(((actual.expert_ids >= 0) & (actual.expert_ids < 40)).all())
    others = [token for token in range(11) if token != 9]
    assert_bit_equal(actual.expert_ids[others], expected.expert_ids[others], "expert ids")
    assert_bit_equal(actual.weights[others], expected.weights[others], "weights")
    assert not bool(num_done.any())


def test_no_two_of_a_tokens_experts_are_one(device):
    """Nor where nothing tells them apart."""
    chosen = ops.route(torch.zeros(3, 64, device=device), 20, score="sigmoid").expert_ids
    assert chosen.cpu().tolist() == [list(range(20))] * 3
