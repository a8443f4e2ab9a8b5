"""RMS norms against the float64 oracle, and alone against batched."""

from __future__ import annotations

import pytest
import torch

from headway import ops
from headway.ops import reference
from tests.cases import NORM_CASES
from tests.compare import assert_bit_equal, assert_close
from tests.inputs import gated_norm_arguments, in_float64, norm_arguments, normal, on_device

pytestmark = pytest.mark.parametrize("case", NORM_CASES.values(), ids=NORM_CASES)


def test_rms_norm(case, dtype, device):
    arguments = norm_arguments(case, dtype)
    expected = reference.rms_norm_ref(**in_float64(arguments))
    assert_close(ops.rms_norm(**on_device(arguments, device)), expected, "rms_norm")


@pytest.mark.parametrize("scale", [1.0, 0.22])
def test_add_rms_norm(case, dtype, device, scale):
    arguments = norm_arguments(case, dtype)
    arguments["residual"] = normal(case.num_tokens, case.hidden, dtype=dtype, seed=5)
    oracle, given = in_float64(arguments), on_device(arguments, device)
    out = torch.empty_like(given["residual"])
    returned = ops.add_rms_norm(**given, residual_scale=scale, out=out)
    # the norm is that of the residual as stored, so the oracle rounds it too
    oracle["residual"] += scale * oracle["x"]
    assert_close(given["residual"], oracle["residual"], "residual")
    stored = given["residual"].cpu().double()
    assert_close(out, reference.rms_norm_ref(stored, oracle["weight"], oracle["eps"]), "add_rms_norm")
    assert returned is out


def test_gated_rms_norm(case, dtype, device):
    arguments = gated_norm_arguments(case, dtype)
    expected = reference.gated_rms_norm_ref(**in_float64(arguments))
    assert_close(ops.gated_rms_norm(**on_device(arguments, device)), expected, "gated_rms_norm")


def test_a_token_alone_is_bit_equal(case, dtype, device):
    arguments = on_device(gated_norm_arguments(case, dtype), device)
    together = ops.gated_rms_norm(**arguments)
    for token in range(case.num_tokens)[:: max(1, case.num_tokens // 5)]:
        one = slice(token, token + 1)
        alone = ops.gated_rms_norm(**{**arguments, "y": arguments["y"][one], "z": arguments["z"][one]})
        assert_bit_equal(alone, together[one], f"gated_rms_norm of token {token}")
        x, weight, eps = arguments["z"], arguments["weight"], arguments["eps"]
        assert_bit_equal(
            ops.rms_norm(x[one], weight, eps), ops.rms_norm(x, weight, eps)[one], f"rms_norm of token {token}"
        )
