"""The experts' kernels of a GPU against the oracle: sizes at their edges, bits of a token alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headway import ops
from headway.ops import Routing, reference
from headway.ops.experts import ExpertKernel, choose_kernel, experts_in_parts, fits_kernels
from tests.cases import MoeCase
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import Arguments, in_float64, moe_arguments, on_device

pytestmark = pytest.mark.gpu

# Widths and hidden sizes that end within a panel of 64 columns and within a tile of 128 rows.
CASES = {
    "relu2": MoeCase(150, 200, 136, 9, 3, False, "relu2"),
    "gated": MoeCase(150, 264, 72, 7, 3, True, "silu"),
    "narrow": MoeCase(70, 8, 8, 3, 2, True, "gelu"),
    "few_rows": MoeCase(260, 2688, 64, 5, 2, False, "relu2"),
    "many_experts": MoeCase(300, 64, 48, 1000, 8, False, "silu"),
    "most_pairs": MoeCase(512, 64, 40, 33, 16, True, "silu"),
}


def run(kernel: ExpertKernel, arguments: Arguments) -> torch.Tensor:
    """What the kernel is to write is NaN before."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty fills
    try:
        return experts_in_parts(kernel, **arguments)
    finally:
        torch.use_deterministic_algorithms(False)


def part_of(arguments: Arguments, begin: int, end: int) -> Arguments:
    routing = arguments["routing"]
    mine = Routing(routing.weights[begin:end], routing.expert_ids[begin:end])
    return {**arguments, "x": arguments["x"][begin:end], "routing": mine}


@pytest.mark.parametrize("kernel", ExpertKernel, ids=lambda kernel: kernel.value)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_experts_of_a_batch(case, kernel, dtype):
    if kernel is ExpertKernel.STREAMED:
        case = dataclasses.replace(case, num_tokens=min(case.num_tokens, 256))
    arguments = moe_arguments(case, dtype)
    expected = reference.moe_experts_ref(**in_float64(arguments))
    actual = run(kernel, on_device(arguments, "cuda"))
    assert actual.dtype == dtype
    assert_close(actual, expected, "experts", tolerance=3 * 2.0**-8)


@pytest.mark.parametrize("kernel", ExpertKernel, ids=lambda kernel: kernel.value)
def test_batch_mates_do_not_change_a_bit(kernel):
    """Alone, where its expert's other pairs fill other tiles, and in any order."""
    arguments = on_device(
        moe_arguments(dataclasses.replace(CASES["gated"], num_tokens=200), torch.bfloat16), "cuda"
    )
    together = run(kernel, arguments)
    for begin, end in ((0, 1), (1, 9), (9, 60), (60, 199), (199, 200)):
        assert_bit_equal(
            run(kernel, part_of(arguments, begin, end)), together[begin:end], f"{begin} to {end}"
        )


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129])
def test_all_tokens_choose_the_same_experts(num_tokens):
    """As many columns as products have, and one more."""
    case = dataclasses.replace(CASES["relu2"], num_tokens=num_tokens)
    arguments = moe_arguments(case, torch.bfloat16)
    ids = torch.tensor([[7, 0, 4]], dtype=torch.int32).repeat(num_tokens, 1)
    arguments["routing"] = Routing(arguments["routing"].weights, ids)
    expected = reference.moe_experts_ref(**in_float64(arguments))
    for kernel in ExpertKernel:
        actual = run(kernel, on_device(arguments, "cuda"))
        assert_close(actual, expected, kernel.value, tolerance=3 * 2.0**-8)


@pytest.mark.parametrize("kernel", ExpertKernel, ids=lambda kernel: kernel.value)
def test_a_bad_token_and_experts_nobody_chose_stay_alone(kernel):
    arguments = on_device(moe_arguments(CASES["relu2"], torch.bfloat16), "cuda")
    expected = run(kernel, arguments)
    for name in ("w_in", "w_out"):
        arguments[name] = torch.cat([arguments[name], torch.full_like(arguments[name], float("nan"))])
    assert_bit_equal(run(kernel, arguments), expected, "experts")
    arguments["x"][3] = float("nan")
    actual = run(kernel, arguments)
    assert bool(actual[3].isnan().all())
    assert_bit_equal(actual[4:], expected[4:], "behind it")
    assert_bit_equal(actual[:3], expected[:3], "before it")


def test_choice_of_the_kernel():
    """Where one ends there is no batch of two kernels: graphs are padded to these numbers of tokens."""
    x = torch.zeros(1025, 64, dtype=torch.bfloat16, device="cuda")
    has_warpgroups = ops.backend.target_of(x).kernels.has_warpgroup_experts()
    streamed, many = ExpertKernel.STREAMED, ExpertKernel.WARPGROUPS
    assert choose_kernel(x[:4], 64, True) is streamed
    assert choose_kernel(x[:5], 64, True) is (many if has_warpgroups else streamed)
    assert choose_kernel(x[:64], 1024, True) is streamed
    assert choose_kernel(x[:65], 1024, True) is (many if has_warpgroups else streamed)
    assert choose_kernel(x[:1024], 1024, True) is (many if has_warpgroups else None)
    assert choose_kernel(x[:1024], 1024, False) is (many if has_warpgroups else streamed)
    assert choose_kernel(x, 64, True) is None


def test_sizes_that_the_kernels_do_not_take():
    x = torch.zeros(2, 64, dtype=torch.bfloat16, device="cuda")
    assert fits_kernels(x, 2, 8, 40)
    assert not fits_kernels(x, 2, 8, 41)
    assert not fits_kernels(x, 2, 1025, 40)
    assert not fits_kernels(x.float(), 2, 8, 40)
    assert not fits_kernels(x[:, 1:9], 2, 8, 40)  # not on 16 bytes
