"""Errors of the kernels and of their peers, of the same inputs, each against the same function in float64.

usage: python -m bench.ops.accuracy [--out FILE] [--only NAME ...]

An error is |actual - right| / |right| over a whole tensor (Frobenius). Inputs are those of the timings, fewer tokens of
them; the judge is headway.ops.reference, token by token. Peers: vLLM's kernels where it is installed, else torch's. It
needs a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ops import bench_attention, bench_mamba, bench_moe
from bench.ops.bench_mamba import SHAPES, Mixer, Shape
from bench.ops.command import add_arguments
from bench.ops.peer_mamba import PeerMixer
from bench.ops.peers import is_vllm_installed, vllm_configured
from bench.ops.report import device_name
from headway import ops
from headway.ops import reference
from headway.ops.moe import grouped_experts
from tests.cases import MambaCase
from tests.ops.slot_windows import WINDOW, Inputs, WindowedRows, walk

START = 64  # tokens before: states are read, and the chunk grid is met
PROMPTS = {"1x512": [512], "ragged": [1, 63, 130, 9, 300]}
DECODE_BATCH = 8
EXPERT_BATCHES = (1, 8, 64)
WINDOW_END = 56  # the position where the walks over windows end; they begin at the first window's end
ATTENTION = {"prompt": (2, 700, 0), "prompt_after_cached": (1, 300, 500), "decode": (4, 1, 3000)}


@dataclass(frozen=True)
class Comparison:
    """One tensor of one op: what is right, float64, and what each implementation gave, by its name."""

    name: str
    right: Tensor
    given: dict[str, Tensor] = field(default_factory=dict)

    def errors(self) -> dict[str, float]:
        norm = float(self.right.norm())
        return {who: float((t.double() - self.right).norm()) / norm for who, t in self.given.items()}


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def mamba_comparisons(shape: Shape, name: str, load: str, lengths: list[int]) -> Iterator[Comparison]:
    mixer = Mixer(shape, lengths, START)
    peer = PeerMixer(mixer) if is_vllm_installed() else None
    is_decode = max(lengths) == 1
    conv, scan, norm = ("conv_step", "ssm_step", "gated_norm") if is_decode else ("conv", "ssd", "norm")
    yield from scan_comparisons(mixer, peer, f"{scan}/{name}/{load}", is_decode)
    yield norm_comparison(mixer, peer, f"{norm}/{name}/{load}")
    yield conv_comparison(mixer, peer, f"{conv}/{name}/{load}", is_decode)


def scan_comparisons(
    mixer: Mixer, peer: PeerMixer | None, name: str, is_decode: bool
) -> Iterator[Comparison]:
    """Outputs, and the states that the rows end with."""
    before, slots = mixer.ssm_state.clone(), mixer.rows[3].long()
    inputs = (mixer.x, mixer.B, mixer.C, mixer.dt, mixer.A, mixer.D, mixer.dt_bias)
    state = before.double()
    y = Comparison(f"{name}/y", reference.ssm_scan_ref(*wide(*inputs), state, *mixer.rows))
    states = Comparison(f"{name}/state", state[slots])
    mixer.scan()
    y.given["headway"], states.given["headway"] = mixer.y.clone(), mixer.ssm_state[slots]
    if peer is not None:
        mixer.ssm_state.copy_(before)
        with vllm_configured():
            if is_decode:
                peer.scan_step()
                states.given["vllm"] = mixer.ssm_state[slots]
            else:
                states.given["vllm"] = peer.scan()
        y.given["vllm"] = mixer.y.clone()
    yield from (y, states)


def norm_comparison(mixer: Mixer, peer: PeerMixer | None, name: str) -> Comparison:
    group_size = mixer.shape.d_inner // mixer.shape.num_groups
    y, z, weight = wide(mixer.y.flatten(1), mixer.z, mixer.norm_weight)
    found = Comparison(name, reference.gated_rms_norm_ref(y, z, weight, 1e-5, group_size))
    mixer.norm()
    found.given["headway"] = mixer.gated
    if peer is not None:
        with vllm_configured():
            found.given["vllm"] = peer.norm()
    return found


def conv_comparison(mixer: Mixer, peer: PeerMixer | None, name: str, is_decode: bool) -> Comparison:
    before = mixer.conv_state.clone()
    right = reference.causal_conv1d_ref(
        *wide(mixer.raw, mixer.conv_weight, mixer.conv_bias, mixer.conv_state), *mixer.rows
    )
    found = Comparison(name, right)
    mixer.conv()
    found.given["headway"] = mixer.columns.clone()
    if peer is not None:
        mixer.conv_state.copy_(before)
        with vllm_configured():
            out = peer.conv_step() if is_decode else peer.conv()
        found.given["vllm"] = out if is_decode else out.t()
    return found


def window_comparison(shape: Shape, name: str) -> Iterator[Comparison]:
    """The whole decode step over two windows and a half; the peer's three kernels keep their state in place."""
    case = MambaCase(shape.num_heads, shape.head_dim, shape.num_groups, shape.state_size)
    inputs = Inputs.draw(case, DECODE_BATCH, WINDOW_END, bench_mamba.DTYPE, bench_mamba.DEVICE)
    rows = WindowedRows(case, [WINDOW] * DECODE_BATCH, bench_mamba.DTYPE, bench_mamba.DEVICE)
    found = Comparison(f"decode_window/{name}/b{DECODE_BATCH}", window_oracle(rows, inputs))
    if is_vllm_installed():
        with vllm_configured():
            found.given["vllm"] = peer_walk(shape, rows, inputs)
    found.given["headway"] = walk(rows, inputs, WINDOW_END)
    yield found


def window_oracle(rows: WindowedRows, inputs: Inputs) -> Tensor:
    """[rows, tokens, H * P]: each row's tokens as one prompt, in float64 throughout."""
    case, weights = rows.case, rows.weights
    count, device = WINDOW_END - WINDOW, rows.ssm_state.device
    z, columns, dt = (t[:, WINDOW:].flatten(0, 1) for t in wide(inputs.z, inputs.columns, inputs.dt))
    query_start = torch.arange(DECODE_BATCH + 1, device=device) * count
    slots = torch.arange(1, DECODE_BATCH + 1, device=device)
    bounds = (query_start, torch.full_like(slots, WINDOW), slots, slots)
    conv = wide(columns, weights.conv_weight, weights.conv_bias, rows.conv_state)
    states = case.num_groups * case.state_size
    x, B, C = reference.causal_conv1d_ref(*conv, *bounds).split([case.d_inner, states, states], dim=1)
    groups = (case.num_groups, case.state_size)
    heads = (x.unflatten(1, (case.num_heads, case.head_dim)), B.unflatten(1, groups), C.unflatten(1, groups))
    rest = wide(weights.A, weights.D, weights.dt_bias, rows.ssm_state)
    y = reference.ssm_scan_ref(*heads, dt, *rest, *bounds).flatten(1)
    norm = (weights.norm_weight.double(), weights.norm_eps, weights.norm_group_size)
    return reference.gated_rms_norm_ref(y, z, *norm).unflatten(0, (DECODE_BATCH, count))


def peer_walk(shape: Shape, rows: WindowedRows, inputs: Inputs) -> Tensor:
    mixer, weights = Mixer(shape, [1] * DECODE_BATCH, WINDOW), rows.weights
    slots = torch.arange(1, DECODE_BATCH + 1, device=bench_mamba.DEVICE, dtype=torch.int32)
    mixer.rows = (*mixer.rows[:2], slots, slots)
    mixer.conv_state, mixer.ssm_state = rows.conv_state.clone(), rows.ssm_state.clone()
    mixer.A, mixer.D, mixer.dt_bias = weights.A, weights.D, weights.dt_bias
    mixer.conv_weight, mixer.conv_bias = weights.conv_weight, weights.conv_bias
    mixer.norm_weight = weights.norm_weight
    peer, outs = PeerMixer(mixer), []
    for position in range(WINDOW, WINDOW_END):
        for buffer, values in ((mixer.z, inputs.z), (mixer.raw, inputs.columns), (mixer.dt, inputs.dt)):
            buffer.copy_(values[:, position])
        mixer.columns.copy_(peer.conv_step())
        peer.scan_step()
        outs.append(peer.norm().clone())
    return torch.stack(outs, dim=1)


def attention_comparison(shape: bench_attention.Shape, name: str, load: str) -> Iterator[Comparison]:
    """The peer is torch's flash attention, over contiguous keys."""
    num_rows, num_queries, start = ATTENTION[load]
    step = bench_attention.Step(shape, num_rows, num_queries, start)
    q, k_cache, v_cache = wide(step.q, step.k_cache, step.v_cache)
    bounds = (step.block_table, step.rows, step.query_start, step.row_start, num_queries, step.kv_len)
    right = reference.paged_attention_ref(q, k_cache, v_cache, *bounds, step.scale)
    step.attend()
    given = {"headway": step.out, "torch flash": flash_over_pages(step)}
    yield Comparison(f"attention/{name}/{load}", right, given)


def flash_over_pages(step: bench_attention.Step) -> Tensor:
    """A row after the other, its pages laid out in order; queries are the last positions."""
    outs = []
    for index, row in enumerate(step.rows.tolist()):
        blocks = step.block_table[row].long()
        keys, values = (c[blocks].flatten(0, 1)[: step.kv_len] for c in (step.k_cache, step.v_cache))
        queries = step.q[index * step.num_queries :][: step.num_queries]
        outs.append(flash_of_a_row(queries, keys, values, step.scale))
    return torch.cat(outs)


def flash_of_a_row(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[queries, Hq, D] at the end of [keys, Hkv, D]; padded in front, since torch's mask begins at the first key."""
    padded = torch.zeros(len(k), *q.shape[1:], dtype=q.dtype, device=q.device)
    padded[len(k) - len(q) :] = q
    heads = [tensor.transpose(0, 1)[None] for tensor in (padded, k, v)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads, is_causal=True, enable_gqa=True, scale=scale
        )
    return out[0].transpose(0, 1)[len(k) - len(q) :]


def experts_comparison(shape: bench_moe.Shape, name: str, batch: int) -> Iterator[Comparison]:
    layer = bench_moe.Layer(shape)
    x = torch.randn(batch, shape.hidden, device=bench_moe.DEVICE, dtype=bench_moe.DTYPE)
    routing = layer.draw_routing(batch)
    how = (shape.activation, shape.is_gated)
    right = reference.moe_experts_ref(x.double(), routing, *wide(layer.w_in, layer.w_out), *how)
    kernels: dict[str, Callable[..., Tensor]] = {"headway": ops.moe_experts, "torch grouped": grouped_experts}
    given = {who: run(x, routing, layer.w_in, layer.w_out, *how) for who, run in kernels.items()}
    if is_vllm_installed():
        given["vllm"] = bench_moe.vllm_experts(x, routing, layer.w_in, layer.w_out, *how)
    yield Comparison(f"experts/{name}/b{batch}", right, given)


def comparisons() -> Iterator[tuple[str, Callable[[], Iterable[Comparison]]]]:
    """By the beginning of their names, to be run one after the other."""
    for name, shape in SHAPES.items():
        for load, lengths in {**PROMPTS, f"b{DECODE_BATCH}": [1] * DECODE_BATCH}.items():
            yield f"mamba/{name}/{load}", partial(mamba_comparisons, shape, name, load, lengths)
        yield f"window/{name}", partial(window_comparison, shape, name)
    for name, attention in bench_attention.SHAPES.items():
        for load in ATTENTION:
            yield f"attention/{name}/{load}", partial(attention_comparison, attention, name, load)
    for name, experts in bench_moe.SHAPES.items():
        for batch in EXPERT_BATCHES:
            yield f"experts/{name}/b{batch}", partial(experts_comparison, experts, name, batch)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    header = {"commit": arguments.commit, "device": device_name(), "torch": torch.__version__}
    errors: dict[str, dict[str, float]] = {}
    for name, compare in comparisons():
        if arguments.only and not name.startswith(tuple(arguments.only)):
            continue
        for found in compare():
            errors[found.name] = {who: float(f"{error:.3e}") for who, error in found.errors().items()}
            cells = (f"{who} {error:.3e}" for who, error in errors[found.name].items())
            print(f"{found.name:44s}", "   ".join(cells), flush=True)
            write(arguments.out, header, errors)
    return 0


def write(path: Path | None, header: dict[str, str], errors: dict[str, dict[str, float]]) -> None:
    if path is not None:
        path.write_text(json.dumps({**header, "relative_errors": errors}, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
