"""The gated norm over many tokens, where small groups share blocks: the bits are those of few tokens."""

from __future__ import annotations

import pytest
import torch

from headway import ops
from tests.compare import assert_bit_equal

pytestmark = pytest.mark.gpu

FEW_TOKENS = 333  # odd: groups come to other places of their blocks
SHAPES = {  # num_tokens, hidden, group_size
    "warp_a_group": (35_001, 128, 64),
    "odd_group": (90_001, 72, 24),
    "block_a_group": (9_003, 1024, 512),
    "partly_idle_block": (9_001, 1392, 696),
    "wide_block": (2_051, 5120, 5120),
}


@pytest.mark.parametrize(("num_tokens", "hidden", "group_size"), SHAPES.values(), ids=SHAPES)
def test_many_tokens_are_bit_equal_to_few(num_tokens, hidden, group_size):
    torch.manual_seed(num_tokens)
    weight = torch.randn(hidden, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16)
    z = torch.randn(num_tokens, hidden + 8, device="cuda", dtype=torch.bfloat16)[:, :hidden]
    out = torch.full_like(y, float("nan"))
    ops.gated_rms_norm(y, z, weight, 1e-5, group_size, out=out)
    few = [
        ops.gated_rms_norm(
            y[first : first + FEW_TOKENS], z[first : first + FEW_TOKENS], weight, 1e-5, group_size
        )
        for first in range(0, num_tokens, FEW_TOKENS)
    ]
    assert_bit_equal(out, torch.cat(few), "gated_rms_norm")
