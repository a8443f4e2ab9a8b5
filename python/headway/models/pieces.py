"""Which checkpoint tensor fills which part of which weight.

A family lists `Piece`s; packing (q, k and v in one matrix, experts in one stack) is where a piece lands, never a
concatenation in memory, so loading needs no more than the largest single tensor on the side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headway.models.config import AttentionConfig, MambaConfig, MlpConfig, MoeConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """One tensor of the checkpoint: its name, the shape it must have, and its place."""

    source: str
    shape: tuple[int, ...]
    target: str  # name of our weight
    index: tuple[int | slice, ...] = ()  # part of it that is filled; () = all
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class MlpNames:
    """Names of a feed-forward layer below its block: (gate, up), (up,) or one tensor that is packed already."""

    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class MoeNames:
    """Names of an expert layer below its block; `{e}` is the expert, and without it the tensor stacks them all."""

    router: str
    expert_inputs: tuple[str, ...]
    expert_output: str
    score_bias: str = ""
    shared: MlpNames | None = None


def tap_major(weight: torch.Tensor) -> torch.Tensor:
    """[conv_dim, 1, W] -> [W, conv_dim]."""
    return weight.squeeze(1).t()


def negative_exp(a_log: torch.Tensor) -> torch.Tensor:
    """A = -exp(A_log), in fp32."""
    return a_log.float().exp().neg()


def mamba_pieces(source: str, target: str, mamba: MambaConfig, hidden_size: int) -> Iterator[Piece]:
    heads = (mamba.num_heads,)
    yield Piece(f"{source}.in_proj.weight", (mamba.in_proj_dim, hidden_size), f"{target}.in_proj")
    yield Piece(f"{source}.out_proj.weight", (hidden_size, mamba.d_inner), f"{target}.out_proj")
    conv_shape = (mamba.conv_dim, 1, mamba.conv_width)
    yield Piece(f"{source}.conv1d.weight", conv_shape, f"{target}.conv_weight", transform=tap_major)
    yield Piece(f"{source}.A_log", heads, f"{target}.A", transform=negative_exp)
    yield Piece(f"{source}.D", heads, f"{target}.D")
    yield Piece(f"{source}.dt_bias", heads, f"{target}.dt_bias")
    yield Piece(f"{source}.norm.weight", (mamba.d_inner,), f"{target}.gate_norm")
    if mamba.conv_bias:
        yield Piece(f"{source}.conv1d.bias", (mamba.conv_dim,), f"{target}.conv_bias")
    if mamba.proj_bias:
        yield Piece(f"{source}.in_proj.bias", (mamba.in_proj_dim,), f"{target}.in_proj_bias")
        yield Piece(f"{source}.out_proj.bias", (hidden_size,), f"{target}.out_proj_bias")


def attention_pieces(
    source: str, target: str, attention: AttentionConfig, hidden_size: int
) -> Iterator[Piece]:
    q_dim, kv_dim = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    parts = [(f"{source}.{name}_proj", size) for name, size in (("q", q_dim), ("k", kv_dim), ("v", kv_dim))]
    yield from _stacked_rows(parts, f"{target}.qkv_proj", ".weight", (hidden_size,))
    yield Piece(f"{source}.o_proj.weight", (hidden_size, q_dim), f"{target}.out_proj")
    if attention.qkv_bias:
        yield from _stacked_rows(parts, f"{target}.qkv_bias", ".bias", ())
    if attention.out_bias:
        yield Piece(f"{source}.o_proj.bias", (hidden_size,), f"{target}.out_bias")
    if attention.has_qk_norm:
        yield Piece(f"{source}.q_norm.weight", (attention.head_dim,), f"{target}.q_norm")
        yield Piece(f"{source}.k_norm.weight", (attention.head_dim,), f"{target}.k_norm")


def mlp_pieces(
    source: str, target: str, names: MlpNames, mlp: MlpConfig, hidden_size: int
) -> Iterator[Piece]:
    parts = _input_parts(source, names.inputs, mlp.intermediate_size, mlp.is_gated)
    output = f"{source}.{names.output}"
    yield from _stacked_rows(parts, f"{target}.in_proj", ".weight", (hidden_size,))
    yield Piece(f"{output}.weight", (hidden_size, mlp.intermediate_size), f"{target}.out_proj")
    if mlp.bias:
        yield from _stacked_rows(parts, f"{target}.in_proj_bias", ".bias", ())
        yield Piece(f"{output}.bias", (hidden_size,), f"{target}.out_proj_bias")


def moe_pieces(
    source: str, target: str, names: MoeNames, moe: MoeConfig, hidden_size: int
) -> Iterator[Piece]:
    yield Piece(f"{source}.{names.router}", (moe.num_experts, hidden_size), f"{target}.router")
    if moe.has_score_bias:
        yield Piece(f"{source}.{names.score_bias}", (moe.num_experts,), f"{target}.score_bias")
    yield from _expert_pieces(source, target, names, moe, moe.latent_size or hidden_size)
    if moe.latent_size:
        yield Piece(f"{source}.fc1_latent_proj.weight", (moe.latent_size, hidden_size), f"{target}.latent_in")
        yield Piece(
            f"{source}.fc2_latent_proj.weight", (hidden_size, moe.latent_size), f"{target}.latent_out"
        )
    if moe.shared_intermediate_size and names.shared is not None:
        width = moe.shared_intermediate_size
        parts = _input_parts(source, names.shared.inputs, width, moe.is_gated)
        yield from _stacked_rows(parts, f"{target}.shared_in", ".weight", (hidden_size,))
        yield Piece(f"{source}.{names.shared.output}.weight", (hidden_size, width), f"{target}.shared_out")


def _expert_pieces(
    source: str, target: str, names: MoeNames, moe: MoeConfig, expert_dim: int
) -> Iterator[Piece]:
    width, num_experts = moe.intermediate_size, moe.num_experts
    if "{e}" not in names.expert_output:
        in_shape = (num_experts, width * (2 if moe.is_gated else 1), expert_dim)
        yield Piece(f"{source}.{names.expert_inputs[0]}", in_shape, f"{target}.expert_in")
        yield Piece(
            f"{source}.{names.expert_output}", (num_experts, expert_dim, width), f"{target}.expert_out"
        )
        return
    for expert in range(num_experts):
        for part, name in enumerate(names.expert_inputs):
            rows = slice(part * width, (part + 1) * width)
            full_name = f"{source}.{name.format(e=expert)}"
            yield Piece(full_name, (width, expert_dim), f"{target}.expert_in", (expert, rows))
        full_name = f"{source}.{names.expert_output.format(e=expert)}"
        yield Piece(full_name, (expert_dim, width), f"{target}.expert_out", (expert,))


def _input_parts(source: str, inputs: Sequence[str], width: int, is_gated: bool) -> list[tuple[str, int]]:
    rows = width * (2 if is_gated else 1) // len(inputs)
    return [(f"{source}.{name}", rows) for name in inputs]


def _stacked_rows(
    parts: Sequence[tuple[str, int]], target: str, suffix: str, columns: tuple[int, ...]
) -> Iterator[Piece]:
    """Parts (name, rows) laid one below the other in the target."""
    start = 0
    for name, num_rows in parts:
        yield Piece(name + suffix, (num_rows, *columns), target, (slice(start, start + num_rows),))
        start += num_rows
