"""Activations, routing and experts against the oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headway import ops
from headway.ops import Routing, reference
from headway.ops.moe import combine_experts, grouped_experts
from tests.cases import MOE_CASES, ROUTE_CASES, NormCase
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import in_float64, moe_arguments, norm_arguments, normal, on_device, route_arguments

ACTIVATION_CASES = {
    "regular": NormCase(5, 128),
    "odd": NormCase(3, 62, gap=7),
    "wide": NormCase(2, 5000, gap=8),
    "empty": NormCase(0, 64),
}


@pytest.mark.parametrize("case", ACTIVATION_CASES.values(), ids=ACTIVATION_CASES)
@pytest.mark.parametrize("kind", ["silu", "relu2", "gelu"])
@pytest.mark.parametrize("is_gated", [False, True])
def test_activation(case, kind, is_gated, dtype, device):
    x = norm_arguments(case, dtype)["x"]
    x *= 3
    expected = reference.activation_ref(x.double(), kind, is_gated)
    given = on_device({"x": x}, device)["x"]
    assert_close(ops.activation(given, kind, is_gated), expected, kind)


def test_activation_at_the_ends_of_the_range(device):
    x = torch.tensor([[-1e4, -200.0, -90.0, -0.0, 0.0, 90.0, 1e4, 1e30]], device=device)
    expected = reference.activation_ref(x.cpu().double(), "silu", False)
    actual = ops.activation(x, "silu", False).cpu().double()
    assert_close(actual, expected, "silu", tolerance=1e-7)
    assert bool(torch.isfinite(actual).all())


@pytest.mark.parametrize("case", ROUTE_CASES.values(), ids=ROUTE_CASES)
def test_route(case, device):
    arguments = route_arguments(case)
    expected = reference.route_ref(**arguments)
    actual = ops.route(**on_device(arguments, device))
    assert_bit_equal(actual.expert_ids, expected.expert_ids, "expert ids")
    assert_close(actual.weights, expected.weights, "weights")


@pytest.mark.parametrize("case", ROUTE_CASES.values(), ids=ROUTE_CASES)
def test_route_of_a_token_alone_is_bit_equal(case, device):
    arguments = on_device(route_arguments(case), device)
    together = ops.route(**arguments)
    for token in range(case.num_tokens):
        alone = ops.route(**{**arguments, "logits": arguments["logits"][token : token + 1]})
        assert_bit_equal(alone.weights, together.weights[token : token + 1], "weights")
        assert_bit_equal(alone.expert_ids, together.expert_ids[token : token + 1], "expert ids")


def num_done():
    return torch.zeros(ops.NUM_ROUTE_GROUPS, dtype=torch.int32, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 8, 9, 16, 64, 300])
@pytest.mark.parametrize(("columns", "num_experts", "top_k"), [(2688, 128, 6), (64, 8, 2), (1536, 62, 3)])
def test_route_hidden(num_tokens, columns, num_experts, top_k, dtype):
    """Router and choice in one launch: the weights of the choice follow from the logits, near ties aside."""
    hidden = normal(num_tokens, columns + 8).to(dtype)[:, :columns]
    router, bias = normal(num_experts, columns) / columns**0.5, normal(num_experts) * 0.1
    how = {"score": "sigmoid", "bias": bias, "scale": 2.5}
    logits = hidden.double() @ router.double().T
    expected = reference.route_ref(logits.float(), top_k, **how)
    given = on_device({"hidden": hidden, "router": router, **how}, "cuda")
    actual = ops.route_hidden(given.pop("hidden"), given.pop("router"), top_k, num_done(), **given)
    biased = (logits.sigmoid() + bias).gather(1, actual.expert_ids.cpu().long())
    assert_close(
        biased, (logits.sigmoid() + bias).gather(1, expected.expert_ids.long()), "scores", tolerance=1e-5
    )
    chosen = logits.sigmoid().gather(1, actual.expert_ids.cpu().long())
    assert_close(actual.weights.cpu(), 2.5 * chosen / chosen.sum(1, keepdim=True), "weights", tolerance=1e-5)


@pytest.mark.gpu
def test_route_hidden_of_a_token_alone_is_bit_equal(dtype):
    hidden, router = normal(15, 256).to(dtype).cuda(), normal(40, 256).cuda()
    together = ops.route_hidden(hidden, router, 4, num_done())
    for token in range(15):
        alone = ops.route_hidden(hidden[token : token + 1], router, 4, num_done())
        assert_bit_equal(alone.weights, together.weights[token : token + 1], "weights")
        assert_bit_equal(alone.expert_ids, together.expert_ids[token : token + 1], "expert ids")


@pytest.mark.parametrize("case", MOE_CASES.values(), ids=MOE_CASES)
def test_moe_experts(case, dtype, device):
    arguments = moe_arguments(case, dtype)
    expected = reference.moe_experts_ref(**in_float64(arguments))
    tolerance = 1e-5 if dtype == torch.float32 else 3 * 2.0**-8  # products round to bf16 on their way
    actual = ops.moe_experts(**on_device(arguments, device))
    assert actual.dtype == dtype
    assert_close(actual, expected, "moe_experts", tolerance=tolerance)


@pytest.mark.parametrize("case", MOE_CASES.values(), ids=MOE_CASES)
def test_grouped_products(case, dtype):
    """What a GPU runs, here on the CPU."""
    arguments = moe_arguments(case, dtype)
    expected = reference.moe_experts_ref(**in_float64(arguments))
    tolerance = 1e-5 if dtype == torch.float32 else 3 * 2.0**-8
    assert_close(grouped_experts(**arguments), expected, "grouped_experts", tolerance=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(5, 3, 64), (3, 2, 62), (700, 6, 2688), (0, 2, 8)], ids=["regular", "odd", "large", "empty"]
)
def test_combine_experts(shape, dtype):
    num_tokens, top_k, hidden = shape
    results, weights = normal(num_tokens * top_k, hidden).to(dtype), torch.rand(num_tokens, top_k)
    places = torch.randperm(num_tokens * top_k).int().view(num_tokens, top_k)
    expected = (results.double()[places.long()] * weights.double()[:, :, None]).sum(1)
    actual = combine_experts(results.cuda(), places.cuda(), weights.cuda())
    assert actual.dtype == dtype
    assert_close(actual, expected, "combined")


def test_experts_of_a_token_alone_are_bit_equal(dtype, cpu_level):
    arguments = moe_arguments(MOE_CASES["few_experts"], dtype)
    x, routing = arguments["x"], arguments["routing"]
    together = ops.moe_experts(**arguments)
    for begin, end in ((0, 1), (1, 3), (3, 10), (10, 69), (69, 70)):
        mine = Routing(routing.weights[begin:end], routing.expert_ids[begin:end])
        alone = ops.moe_experts(**{**arguments, "x": x[begin:end], "routing": mine})
        assert_bit_equal(alone, together[begin:end], f"tokens {begin} to {end}")


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [3, 256, 257, 700])
def test_invariant_experts_of_a_token_alone_are_bit_equal(num_tokens):
    """On a GPU, of any number of tokens; those of few are the ones that are computed anyway."""
    case = dataclasses.replace(MOE_CASES["relu2"], num_tokens=num_tokens)
    arguments = on_device(moe_arguments(case, torch.bfloat16), "cuda")
    x, routing = arguments["x"], arguments["routing"]
    together = ops.moe_experts(**arguments, is_invariant=True)
    if num_tokens == 3:
        assert_bit_equal(ops.moe_experts(**arguments), together, "together")
    for begin, end in ((0, 1), (1, 3), (num_tokens - 1, num_tokens)):
        mine = Routing(routing.weights[begin:end], routing.expert_ids[begin:end])
        part = {**arguments, "x": x[begin:end], "routing": mine}
        assert_bit_equal(ops.moe_experts(**part, is_invariant=True), together[begin:end], f"{begin} to {end}")


def test_experts_nobody_chose_are_not_computed(dtype, device):
    """Their weights may be anything."""
    arguments = on_device(moe_arguments(MOE_CASES["relu2"], dtype), device)
    expected = ops.moe_experts(**arguments)
    chosen = arguments["routing"].expert_ids.unique().long().tolist()
    for expert in set(range(MOE_CASES["relu2"].num_experts)) - set(chosen):
        arguments["w_in"][expert] = float("nan")
        arguments["w_out"][expert] = float("nan")
    assert_bit_equal(ops.moe_experts(**arguments), expected, "moe_experts")


def test_all_tokens_may_choose_one_expert(dtype, device):
    arguments = moe_arguments(MOE_CASES["gated"], dtype)
    ids = torch.zeros(9, 1, dtype=torch.int32) + 5
    arguments["routing"] = Routing(torch.ones(9, 1), ids)
    expected = reference.moe_experts_ref(**in_float64(arguments))
    actual = ops.moe_experts(**on_device(arguments, device))
    assert_close(actual, expected, "one expert", tolerance=1e-5 if dtype == torch.float32 else 3 * 2.0**-8)


def test_route_weights_are_those_of_the_unbiased_scores(device):
    logits = normal(4, 16)
    bias = torch.zeros(16)
    bias[3] = 100.0
    routing = ops.route(logits.to(device), 1, score="sigmoid", bias=bias.to(device), normalise=False)
    assert routing.expert_ids.cpu().flatten().tolist() == [3] * 4
    assert_close(routing.weights.cpu().flatten(), logits[:, 3].sigmoid(), "weights")
