"""Wrong arguments are refused with the op, the argument, its dimensions, what was expected and what was given."""

from __future__ import annotations

import importlib

import pytest
import torch

from headway import ops
from headway.errors import BuildError
from headway.ops import backend
from tests.cases import ATTENTION_CASES, MAMBA_CASES, MOE_CASES, NORM_CASES, ROUTE_CASES, ROWS
from tests.inputs import (
    attention_arguments,
    conv_arguments,
    gated_norm_arguments,
    kv_write_arguments,
    moe_arguments,
    norm_arguments,
    rotary_arguments,
    route_arguments,
    scan_arguments,
)

F32 = torch.float32
MAMBA, ATTENTION, MIXED = MAMBA_CASES["regular"], ATTENTION_CASES["regular"], ROWS["mixed"]
GOOD = {
    "rms_norm": norm_arguments(NORM_CASES["regular"], F32),
    "gated_rms_norm": gated_norm_arguments(NORM_CASES["regular"], F32),
    "causal_conv1d": conv_arguments(MAMBA, MIXED, F32),
    "ssm_scan": scan_arguments(MAMBA, MIXED, F32),
    "rotary": rotary_arguments(ATTENTION, MIXED, F32),
    "kv_write": kv_write_arguments(ATTENTION, MIXED, F32),
    "paged_attention": attention_arguments(ATTENTION, MIXED, F32),
    "route": route_arguments(ROUTE_CASES["sigmoid"]),
    "moe_experts": moe_arguments(MOE_CASES["gated"], F32),
}
BAD = [
    ("rms_norm", "weight", lambda t: t[1:], r"weight must be a contiguous \[C\] = \[128\].*\[127\]"),
    ("rms_norm", "weight", lambda t: t.double(), "weight must be torch.float32, got torch.float64"),
    ("rms_norm", "x", lambda t: t[:, ::2], "x must be contiguous after its first dimension"),
    ("gated_rms_norm", "z", lambda t: t[:4], r"z must have shape \[T, d\] = \[5, 128\], got \[4, 128\]"),
    ("gated_rms_norm", "group_size", lambda _: 48, "group_size must divide d = 128, got 48"),
    ("causal_conv1d", "weight", lambda t: torch.cat([t, t]), "2 to 4 taps, got 8"),
    ("causal_conv1d", "state", lambda t: t[:, 1:], r"\[num_slots, W - 1, conv_dim\]"),
    ("causal_conv1d", "query_start", lambda t: t[1:], r"query_start must be a contiguous \[R \+ 1\] = \[6\]"),
    ("causal_conv1d", "row_start", lambda t: t.long(), "row_start must be int32, got torch.int64"),
    ("ssm_scan", "B", lambda t: torch.cat([t, t, t], 1), "divides H = 4, got 3"),
    ("ssm_scan", "dt", lambda t: t[:, :3], r"dt must have shape \[T, H\]"),
    ("ssm_scan", "state", lambda t: t.bfloat16(), "state must be float32 or float16, got torch.bfloat16"),
    ("ssm_scan", "A", lambda t: t[:2], r"A must be a contiguous \[H\] = \[4\]"),
    ("rotary", "cos_sin", lambda t: t[:, :-1].contiguous(), "even number of columns up to D = 64, got 63"),
    ("rotary", "positions", lambda t: t[1:], "positions must be a contiguous"),
    ("kv_write", "v", lambda t: t[1:], r"v must have shape \[T, Hkv, D\]"),
    ("kv_write", "v_cache", lambda t: t.bfloat16(), "v_cache must be torch.float32"),
    ("paged_attention", "q", lambda t: t[:, :3], "a multiple of Hkv = 2 heads, got 3"),
    ("paged_attention", "block_table", lambda t: t.long(), "block_table must be torch.int32"),
    ("route", "top_k", lambda _: 129, r"top_k must lie in 1\.\.128, the experts that compete, got 129"),
    ("route", "num_groups", lambda _: 3, "num_groups must divide E = 128"),
    ("moe_experts", "w_out", lambda t: t[:, :, 1:], r"w_out must have shape \[E, C, F\]"),
]


@pytest.mark.parametrize(("name", "argument", "spoil", "message"), BAD)
def test_a_wrong_argument_is_named(name, argument, spoil, message):
    arguments = dict(GOOD[name])
    arguments[argument] = spoil(arguments.get(argument))
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        getattr(ops, name)(**arguments)


def test_a_wrong_out_is_refused():
    arguments = GOOD["rms_norm"]
    with pytest.raises(
        ValueError, match=r"out must be a contiguous torch.float32 tensor of shape \[5, 128\]"
    ):
        ops.rms_norm(**arguments, out=torch.empty(5, 127))


def test_a_dtype_without_kernels_is_refused():
    x = torch.ones(2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="x must be float32 or bfloat16"):
        ops.rms_norm(x, torch.ones(8, dtype=torch.float64), 1e-5)


def test_a_device_without_kernels_is_refused():
    x = torch.empty(2, 8, device="meta")
    with pytest.raises(BuildError, match="no kernels for device meta"):
        ops.rms_norm(x, torch.empty(8, device="meta"), 1e-5)


def test_a_missing_module_names_the_command_that_builds_it(monkeypatch):
    def fail(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", fail)
    backend._cpu_target.cache_clear()
    with pytest.raises(BuildError, match=r"headway\._cpu is missing.*HEADWAY_DEVICE=cpu pip install"):
        ops.rms_norm(torch.ones(1, 8), torch.ones(8), 1e-5)
