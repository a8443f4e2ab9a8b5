"""CPU results do not depend on the number of threads; the cases are large enough to be shared out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from headway import ops
from tests.cases import ATTENTION_CASES, MAMBA_CASES, MoeCase, NormCase, Rows
from tests.compare import assert_bit_equal
from tests.inputs import (
    attention_arguments,
    conv_arguments,
    gated_norm_arguments,
    moe_arguments,
    norm_arguments,
    on_device,
    scan_arguments,
)

F32 = torch.float32
ROWS = Rows((1, 1, 120, 40), (30, 9, 0, 64))
CALLS = {
    "rms_norm": (ops.rms_norm, norm_arguments(NormCase(300, 512), F32)),
    "gated_rms_norm": (ops.gated_rms_norm, gated_norm_arguments(NormCase(300, 512, group_size=128), F32)),
    "causal_conv1d": (ops.causal_conv1d, conv_arguments(MAMBA_CASES["nano"], ROWS, F32)),
    "ssm_scan": (ops.ssm_scan, scan_arguments(MAMBA_CASES["nano"], ROWS, F32)),
    "paged_attention": (ops.paged_attention, attention_arguments(ATTENTION_CASES["wide"], ROWS, F32)),
    "moe_experts": (ops.moe_experts, moe_arguments(MoeCase(60, 64, 96, 8, 2, True, "silu"), F32)),
}


@pytest.fixture
def restored_threads() -> Iterator[None]:
    yield
    ops.set_num_threads(torch.get_num_threads())


@pytest.mark.parametrize("name", CALLS)
def test_threads_do_not_change_a_bit(name, restored_threads):
    op, arguments = CALLS[name]
    states, outs = [], []
    for num_threads in (1, 2, 3):
        ops.set_num_threads(num_threads)
        given = on_device(arguments, "cpu")
        outs.append(op(**given))
        states.append(given.get("state", outs[-1]))
    for out, state in zip(outs[1:], states[1:], strict=True):
        assert_bit_equal(out, outs[0], name)
        assert_bit_equal(state, states[0], f"{name} state")
