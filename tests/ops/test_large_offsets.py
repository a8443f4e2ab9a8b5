"""Slots, blocks and tokens whose offsets pass 2^31 elements give the same bits as the same data close together.

On a CPU the gigabytes are address space only: pages nobody touches are never backed.
"""

from __future__ import annotations

import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch

from headway import ops
from headway.ops.layout import STATE_COPY
from headway.ops.records import Routing
from tests.cases import ATTENTION_CASES, MAMBA_CASES, MambaCase, Rows
from tests.compare import assert_bit_equal
from tests.inputs import (
    attention_arguments,
    conv_arguments,
    kv_write_arguments,
    normal,
    on_device,
    rotary_arguments,
    scan_arguments,
)
from tests.ops.packets import copy_to, result_rows
from tests.ops.slot_windows import Inputs, WindowedRows, walk
from tests.ops.test_sample import random_rows

STRIDE = 2**30 + 64  # elements: the third entry lies beyond 2^31
ROWS = Rows((1, 5, 3), (4, 0, 7))
SIZES = {torch.float32: 4, torch.bfloat16: 2}


def reserve(num_elements: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Memory of any content."""
    if device == "cuda":
        return torch.empty(num_elements, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, num_elements * SIZES[dtype], flags=flags), dtype=dtype)


def spread(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """The same values, the first dimension's entries STRIDE elements apart."""
    num_elements = (tensor.shape[0] - 1) * STRIDE + tensor[0].numel()
    storage = reserve(num_elements, tensor.dtype, device)
    far = storage.as_strided(tensor.shape, (STRIDE, *tensor.stride()[1:]))
    far.copy_(tensor)
    return far


# One after the other where tests run in parallel: together they would fill any GPU.
pytestmark = pytest.mark.xdist_group("gigabytes")


@pytest.fixture(autouse=True)
def needs_memory(device):
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    yield
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("name", ["conv", "scan"])
def test_state_slots(name, device):
    op, build = {
        "conv": (ops.causal_conv1d, conv_arguments),
        "scan": (ops.ssm_scan, scan_arguments),
    }[name]
    near = on_device(build(MAMBA_CASES["regular"], ROWS, torch.float32), device)
    far = {**near, "state": spread(near["state"], device)}
    expected = op(**near)
    assert_bit_equal(op(**far), expected, name)
    assert_bit_equal(far["state"], near["state"], f"{name} state")


def test_tokens_of_strided_inputs(device):
    rows = Rows((3,), (0,))
    near = on_device(scan_arguments(MAMBA_CASES["regular"], rows, torch.bfloat16), device)
    far = {**near, "state": near["state"].clone()}
    far |= {name: spread(near[name], device) for name in ("x", "B", "C", "dt")}
    expected = ops.ssm_scan(**near)
    assert_bit_equal(ops.ssm_scan(**far), expected, "ssm_scan")

    y, z = normal(3, 64).bfloat16().to(device), normal(3, 64, seed=2).bfloat16().to(device)
    weight = torch.ones(64, dtype=torch.bfloat16, device=device)
    expected = ops.gated_rms_norm(y, z, weight, 1e-5, 32)
    assert_bit_equal(ops.gated_rms_norm(y, spread(z, device), weight, 1e-5, 32), expected, "gated_rms_norm")
    assert_bit_equal(ops.rms_norm(spread(z, device), weight, 1e-5), ops.rms_norm(z, weight, 1e-5), "rms_norm")


@pytest.mark.parametrize("case", [MAMBA_CASES["regular"], MAMBA_CASES["odd"]], ids=["regular", "odd"])
def test_tokens_of_a_convolution(case, device):
    near = on_device(conv_arguments(case, Rows((2, 1), (0, 5)), torch.bfloat16), device)
    far = {**near, "state": near["state"].clone(), "x": spread(near["x"], device)}
    assert_bit_equal(ops.causal_conv1d(**far), ops.causal_conv1d(**near), "causal_conv1d")
    assert_bit_equal(far["state"], near["state"], "state")


def test_tokens_of_what_is_around_the_mixers(device):
    """Activations, the norm with a residual, rotary in place, keys and values on their way to the cache."""
    x = normal(3, 64, dtype=torch.bfloat16).to(device)
    assert_bit_equal(
        ops.activation(spread(x, device), "silu", True), ops.activation(x, "silu", True), "activation"
    )
    weight = torch.ones(64, dtype=torch.bfloat16, device=device)
    residual, again = (normal(3, 64, dtype=torch.bfloat16, seed=2).to(device) for _ in range(2))
    expected = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert_bit_equal(ops.add_rms_norm(spread(x, device), again, weight, 1e-5), expected, "add_rms_norm")
    assert_bit_equal(again, residual, "residual")
    case, rows = ATTENTION_CASES["regular"], Rows((3,), (4,))
    near = on_device(rotary_arguments(case, rows, torch.bfloat16), device)
    far = {**near, "q": spread(near["q"], device), "k": spread(near["k"], device)}
    for arguments in (near, far):
        ops.rotary(**arguments)
    near_kv = on_device(kv_write_arguments(case, rows, torch.bfloat16), device)
    far_kv = on_device(near_kv, device)
    far_kv |= {"k": spread(near_kv["k"], device), "v": spread(near_kv["v"], device)}
    for arguments in (near_kv, far_kv):
        ops.kv_write(**arguments)
    for name, got, want in (
        ("q", far, near),
        ("k", far, near),
        ("k_cache", far_kv, near_kv),
        ("v_cache", far_kv, near_kv),
    ):
        assert_bit_equal(got[name], want[name], name)


@pytest.mark.parametrize(
    "num_tokens", [3, pytest.param(70, marks=pytest.mark.gpu), pytest.param(300, marks=pytest.mark.gpu)]
)
def test_experts(num_tokens, device):
    """600 of them: the last one's weights begin beyond 2^31 elements. Tokens lie far apart where they are few."""
    hidden, width, used = 2048, 2048, [0, 520, 599]
    w_in, w_out = (
        normal(3, width, hidden, seed=seed, scale=0.02, dtype=torch.bfloat16).to(device) for seed in (2, 3)
    )
    places = torch.stack(
        [torch.randperm(3, generator=torch.Generator().manual_seed(t))[:2] for t in range(num_tokens)]
    )
    routing = Routing(torch.rand(num_tokens, 2).to(device), places.int().to(device))
    x = normal(num_tokens, hidden, dtype=torch.bfloat16).to(device)
    expected = ops.moe_experts(x, routing, w_in, w_out, "relu2", False)
    far = []
    for weights in (w_in, w_out):
        many = reserve(600 * width * hidden, torch.bfloat16, device).view(600, width, hidden)
        many[used] = weights
        far.append(many)
    far_routing = Routing(routing.weights, torch.tensor(used, dtype=torch.int32)[places].to(device))
    tokens = spread(x, device) if num_tokens == 3 else x
    assert_bit_equal(ops.moe_experts(tokens, far_routing, *far, "relu2", False), expected, "moe_experts")


def test_copied_and_moved_states(device):
    """Between slots of one pool whose layers hold more than 2^31 elements, and between pools of as many records."""
    num_slots, size = 2**25 + 8, 64
    pool = reserve(2 * num_slots * size, torch.float32, device).view(2, num_slots, size)
    values = normal(2, size).to(device)
    pool[:, num_slots - 2] = values
    copies = torch.from_numpy(np.array([(num_slots - 2, 5, 0, 0)], STATE_COPY).view(np.uint8)).to(device)
    ops.copy_states([pool], copies.data_ptr(), 1)
    assert_bit_equal(pool[:, 5], values, "copied")
    pools = ops.RecordPools.pair([pool[0]], [pool[1]], torch.device(device))
    moves = torch.tensor([[num_slots - 2, num_slots - 1]], dtype=torch.int32).to(device)
    ops.move_records(pools, moves)
    assert_bit_equal(pool[1, num_slots - 1], values[0], "moved")


def spread_slots(rows: WindowedRows, num_slots: int, device: str) -> None:
    """Moves the states and logs of the first slots apart."""

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        return spread(tensor[:num_slots], device)

    log = rows.log
    rows.conv_state, rows.ssm_state = apart(rows.conv_state), apart(rows.ssm_state)
    rows.log = replace(log, columns=apart(log.columns), dt=apart(log.dt), raw=apart(log.raw))


def test_window_slots_and_tokens(device):
    """Two rows over two windows, the second far away; then its state is folded, and three far tokens decode."""
    case, origin, end = MambaCase(2, 32, 1, 64), 9, 43
    inputs = Inputs.draw(case, 2, end + 3, torch.bfloat16, device)
    near, far = (WindowedRows(case, [origin] * 2, torch.bfloat16, device) for _ in range(2))
    spread_slots(far, 3, device)
    assert_bit_equal(walk(far, inputs, end), walk(near, inputs, end), "windowed decode")
    copies = torch.from_numpy(np.array([(2, 2, end, 0)], STATE_COPY).view(np.uint8)).to(device)
    for rows in (near, far):
        bases = torch.zeros(len(rows.ssm_state), dtype=torch.int32, device=device)
        bases[2] = rows.bases[1]
        states = (rows.conv_state, rows.ssm_state, rows.log)
        ops.fold_states(rows.weights, *states, bases, copies.data_ptr(), 1)
        rows.bases[1] = end
    assert_bit_equal(far.ssm_state[1:], near.ssm_state[1:3], "states")
    expected = near.step(inputs, [3], [1])
    far.spread_tokens = lambda tensor: spread(tensor, device)
    assert_bit_equal(far.step(inputs, [3], [1]), expected, "far tokens")


ATTENTION_STEPS = {
    "regular": (ATTENTION_CASES["regular"], Rows((1, 2), (15, 0))),
    "heads_of_128": (ATTENTION_CASES["wide"], Rows((1, 2), (15, 0))),
    "prompt": (ATTENTION_CASES["regular"], Rows((12,), (5,))),
}


@pytest.mark.parametrize(("case", "rows"), ATTENTION_STEPS.values(), ids=ATTENTION_STEPS)
def test_cache_blocks(case, rows, device):
    near = on_device(kv_write_arguments(case, rows, torch.bfloat16), device)
    far = {**near, **{name: spread(near[name], device) for name in ("k_cache", "v_cache")}}
    ops.kv_write(**near)
    ops.kv_write(**far)
    for name in ("k_cache", "v_cache"):
        assert_bit_equal(far[name], near[name], name)
    near = on_device(attention_arguments(case, rows, torch.bfloat16), device)
    far = {**near, **{name: spread(near[name], device) for name in ("k_cache", "v_cache")}}
    expected = ops.paged_attention(**near)
    assert_bit_equal(ops.paged_attention(**far), expected, "paged_attention")


@pytest.mark.parametrize("length", [2, 9])
def test_queries(length, device):
    """Far apart, of rows that decode and of a prompt."""
    rows = Rows((1, length), (3, 20))
    near = on_device(attention_arguments(ATTENTION_CASES["wide"], rows, torch.bfloat16), device)
    far = {**near, "q": spread(near["q"], device)}
    assert_bit_equal(ops.paged_attention(**far), ops.paged_attention(**near), "paged_attention")


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3}], ids=str
)
def test_logits(options, device):
    """Of several pieces a row, edited and not; the third row is far."""
    vocab_size, num_rows = 20_011, 3
    buffers = copy_to(random_rows(options, vocab_size, num_rows, seed=1), device)
    logits = normal(num_rows, vocab_size, scale=2.5).to(device)
    ops.sample(buffers, logits)
    expected = result_rows(buffers, num_rows).tobytes()
    ops.sample(buffers, spread(logits, device))
    assert result_rows(buffers, num_rows).tobytes() == expected


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("num_outputs", [70, 40_001])
def test_tokens_of_skinny_products(num_outputs, device):
    """By either kernel: the second matrix is large and tall."""
    x = normal(3, 264, dtype=torch.bfloat16).to(device)
    weight = normal(num_outputs, 264, seed=2, dtype=torch.bfloat16).to(device)
    expected = ops.skinny_linear(x, weight)
    out = spread(torch.zeros_like(expected), device)
    assert_bit_equal(ops.skinny_linear(spread(x, device), weight, out=out), expected, "skinny_linear")
