"""Wrong arguments are refused with the op, the argument, its dimensions, what was expected and what was given."""

from __future__ import annotations

import importlib

import pytest
import torch

from headway import ops
from headway.errors import ArgumentError, BuildError, HeadwayError
from headway.ops import backend
from tests.cases import (
    ATTENTION_CASES,
    MAMBA_CASES,
    MOE_CASES,
    NORM_CASES,
    ROUTE_CASES,
    ROWS,
    AttentionCase,
)
from tests.inputs import (
    attention_arguments,
    conv_arguments,
    gated_norm_arguments,
    kv_write_arguments,
    moe_arguments,
    norm_arguments,
    on_device,
    rotary_arguments,
    route_arguments,
    scan_arguments,
)
from tests.ops.packets import allocate

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
    (
        "moe_experts",
        "activation",
        lambda _: "tanh",
        "activation must be one of silu, relu2, gelu, got 'tanh'",
    ),
    (
        "moe_experts",
        "routing",
        lambda r: r._replace(expert_ids=r.expert_ids.long()),
        "routing.expert_ids must be torch.int32, got torch.int64",
    ),
    (
        "moe_experts",
        "routing",
        lambda r: r._replace(weights=r.weights.t().contiguous().t()),
        "routing.weights must be contiguous",
    ),
    ("route", "score", lambda _: "tanh", "score must be one of softmax, sigmoid, got 'tanh'"),
    ("route", "num_groups", lambda _: 0, "num_groups must divide E = 128"),
    ("paged_attention", "k_cache", lambda t: t[:, :, :0], "a multiple of Hkv = 0 heads, got 4"),
]
# Beyond what the kernels of a GPU take, though right in itself: (op, changes of its good arguments, message).
ZEROS = torch.zeros
BEYOND_A_GPU = [
    ("rms_norm", {"x": ZEROS(1, 32776), "weight": ZEROS(32776)}, "x must have at most C = 32768 columns"),
    (
        "gated_rms_norm",
        {"y": ZEROS(1, 32776), "z": ZEROS(1, 32776), "weight": ZEROS(32776), "group_size": 32776},
        "group_size must be at most 32768",
    ),
    (
        "ssm_scan",
        {"B": ZEROS(59, 1, 264), "C": ZEROS(59, 1, 264), "state": ZEROS(7, 4, 16, 264)},
        "B must have at most N = 256 states",
    ),
    ("route", {"logits": ZEROS(2, 1025), "bias": None}, "experts must be at most E = 1024"),
    (
        "route",
        {"logits": ZEROS(2, 66), "bias": None, "num_groups": 33, "topk_group": 33},
        "num_groups must be at most 32",
    ),
    ("moe_experts", {"is_invariant": True}, "x must be 16-bit, with C and F multiples of 8"),
]


@pytest.mark.parametrize(("name", "argument", "spoil", "message"), BAD)
def test_a_wrong_argument_is_named(name, argument, spoil, message):
    arguments = dict(GOOD[name])
    arguments[argument] = spoil(arguments.get(argument))
    with pytest.raises(ArgumentError, match=f"^{name}: .*{message}"):
        getattr(ops, name)(**arguments)


def test_an_error_is_headways_and_a_value_error():
    assert issubclass(ArgumentError, HeadwayError)
    assert issubclass(ArgumentError, ValueError)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "changes", "message"), BEYOND_A_GPU)
def test_what_a_gpu_does_not_take_is_named_before_anything_is_allocated(name, changes, message):
    arguments = on_device({**GOOD[name], **changes}, "cuda")
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with pytest.raises(ArgumentError, match=f"^{name}: .*{message}"):
        getattr(ops, name)(**arguments)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_a_head_that_no_kernel_holds_is_refused():
    case = AttentionCase(2, 1, 520)
    arguments = on_device(attention_arguments(case, MIXED, torch.bfloat16), "cuda")
    with pytest.raises(ArgumentError, match="q must have at most D = 512 channels a head on a GPU, got 520"):
        ops.paged_attention(**arguments)


def test_products_of_few_tokens_name_where_they_run():
    x, weight = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(3, 8, dtype=torch.bfloat16)
    with pytest.raises(
        ArgumentError, match=r"x must be bfloat16 or float16 on a GPU, got torch.bfloat16 on cpu"
    ):
        ops.skinny_linear(x, weight)


@pytest.mark.gpu
def test_products_of_few_tokens_name_what_they_do_not_take():
    x = torch.zeros(2, 24, dtype=torch.bfloat16, device="cuda")
    for wrong, inputs in ((x[:, :20], 20), (x[:, 4:12], 8), (x.view(4, 12)[:, :8], 8)):
        with pytest.raises(ArgumentError, match=f"multiples of 16 bytes.*in = {inputs}"):
            ops.skinny_linear(wrong, torch.zeros(3, inputs, dtype=torch.bfloat16, device="cuda"))
    with pytest.raises(ArgumentError, match=r"x must be bfloat16 or float16 on a GPU, got torch.float32"):
        ops.skinny_linear(x.float(), torch.zeros(3, 24, device="cuda"))
    with pytest.raises(ArgumentError, match=r"weight must have shape \[out, in\]"):
        ops.skinny_linear(x, torch.zeros(3, 16, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize("vocab_size", [0, 8193])
def test_logits_of_another_vocabulary_are_refused(vocab_size, device):
    """Whose tokens the masks know nothing of."""
    buffers = allocate(device)
    with pytest.raises(
        ArgumentError, match=rf"sample: logits must have V = 1\.\.8192 columns, got {vocab_size}"
    ):
        ops.sample(buffers, torch.zeros(2, vocab_size, device=device))


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
