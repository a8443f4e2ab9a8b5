"""The final judge of a model: every layer straight from its formula, in fp64, one whole sequence at a time.

It shares nothing with the served model but the weights: no packing is undone, no cache is kept, no op is called. Where
its router's scores are all but tied, it can follow the served model's choice of experts: either is right then.
Formulas and letters: docs/shapes.md; Mamba-2: Dao and Gu, 2024; routing: DeepSeek-V3 report, section 2.1.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from headway.models.config import AttentionConfig, MambaConfig, ModelConfig, MoeConfig

Weights = Mapping[str, torch.Tensor]
Choices = Mapping[int, Sequence[Sequence[int]]]  # layer: of each token, the experts that somebody chose

# Scores lie in [0, 1]; bfloat16 rounds to 2^-9 of a value, several times on the way to a router.
TIED_SCORES = 2.0**-6


def oracle_logits(
    config: ModelConfig, params: Weights, tokens: Sequence[int], choices: Choices | None = None
) -> torch.Tensor:
    """[T, V] fp64 logits of every position of one sequence.

    choices: of a model in bfloat16, to be followed. An assertion fails where they are no near tie.
    """
    wide = {name: tensor.double() for name, tensor in params.items()}
    residual = wide["embedding"][torch.tensor(tokens)] * config.embedding_multiplier
    for layer_idx, kind in enumerate(config.layers):
        prefix = f"layers.{layer_idx}."
        layer = {
            name.removeprefix(prefix): tensor for name, tensor in wide.items() if name.startswith(prefix)
        }
        x = _norm(residual, layer["norm"], config.norm_eps)
        if kind == "mamba":
            assert config.mamba is not None
            y = _mamba(config.mamba, layer, x, config.norm_eps)
        elif kind == "attention":
            assert config.attention is not None
            y = _attention(config.attention, layer, x, config.norm_eps)
        elif kind == "mlp":
            assert config.mlp is not None
            y = _mlp(x, layer, "", config.mlp.activation, config.mlp.is_gated)
        else:
            assert config.moe is not None
            y = _moe(config.moe, layer, x, None if choices is None else choices[layer_idx])
        residual = residual + config.residual_multiplier * y
    hidden = _norm(residual, wide["final_norm"], config.norm_eps)
    return hidden @ wide.get("head", wide["embedding"]).T / config.logits_divisor


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _mamba(mamba: MambaConfig, w: Weights, x: torch.Tensor, eps: float) -> torch.Tensor:
    states = mamba.num_groups * mamba.state_size
    projected = x @ w["in_proj"].T + w.get("in_proj_bias", 0.0)
    z, raw, dt = projected.split([mamba.d_inner, mamba.conv_dim, mamba.num_heads], dim=1)
    columns = torch.zeros_like(raw) + w.get("conv_bias", 0.0)
    for tap in range(mamba.conv_width):
        lag = mamba.conv_width - 1 - tap
        columns[lag:] += w["conv_weight"][tap] * raw[: len(raw) - lag]
    u, B, C = (columns * columns.sigmoid()).split([mamba.d_inner, states, states], dim=1)
    y = _scan(mamba, w, u, B, C, dt) * (z * z.sigmoid())
    groups = y.unflatten(1, (-1, mamba.norm_group_size or mamba.d_inner // mamba.num_groups))
    normed = _norm(groups, torch.ones(()), eps).flatten(1) * w["gate_norm"]
    return normed @ w["out_proj"].T + w.get("out_proj_bias", 0.0)


def _scan(
    mamba: MambaConfig, w: Weights, u: torch.Tensor, B: torch.Tensor, C: torch.Tensor, dt: torch.Tensor
) -> torch.Tensor:
    heads_a_group = mamba.num_heads // mamba.num_groups
    u = u.unflatten(1, (mamba.num_heads, mamba.head_dim))
    B, C = (
        part.unflatten(1, (mamba.num_groups, mamba.state_size)).repeat_interleave(heads_a_group, 1)
        for part in (B, C)
    )
    dt = (dt + w["dt_bias"]).exp().log1p().clamp(mamba.dt_min, mamba.dt_max)
    state = torch.zeros(mamba.num_heads, mamba.head_dim, mamba.state_size, dtype=torch.float64)
    outputs = []
    for t in range(len(u)):
        decay = (w["A"] * dt[t]).exp()[:, None, None]
        state = decay * state + dt[t][:, None, None] * u[t][:, :, None] * B[t][:, None, :]
        outputs.append((state * C[t][:, None, :]).sum(-1) + w["D"][:, None] * u[t])
    return torch.stack(outputs).flatten(1)


def _attention(attention: AttentionConfig, w: Weights, x: torch.Tensor, eps: float) -> torch.Tensor:
    head_dim, num_kv = attention.head_dim, attention.num_kv_heads
    qkv = (x @ w["qkv_proj"].T + w.get("qkv_bias", 0.0)).unflatten(1, (-1, head_dim))
    q, k, v = qkv.split([attention.num_heads, num_kv, num_kv], dim=1)
    if attention.has_qk_norm:
        q, k = _norm(q, w["q_norm"], eps), _norm(k, w["k_norm"], eps)
    if attention.rope is not None:
        assert attention.rope.scaling.get("rope_type", "default") == "default"
        q = _rotate(q, attention.rope.theta, attention.rope.rotary_dim)
        k = _rotate(k, attention.rope.theta, attention.rope.rotary_dim)
    k, v = (part.repeat_interleave(attention.num_heads // num_kv, 1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * attention.scale
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -math.inf).softmax(-1), v)
    return mixed.flatten(1) @ w["out_proj"].T + w.get("out_bias", 0.0)


def _rotate(heads: torch.Tensor, theta: float, rotary_dim: int) -> torch.Tensor:
    half = rotary_dim // 2
    positions = torch.arange(len(heads), dtype=torch.float64)
    angles = positions[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, :]
    turned = torch.complex(heads[..., :half], heads[..., half:rotary_dim]) * turn
    return torch.cat((turned.real, turned.imag, heads[..., rotary_dim:]), dim=-1)


def _mlp(x: torch.Tensor, w: Weights, prefix: str, activation: str, is_gated: bool) -> torch.Tensor:
    hidden = x @ w[f"{prefix}in_proj"].T + w.get(f"{prefix}in_proj_bias", 0.0)
    return _act(hidden, activation, is_gated) @ w[f"{prefix}out_proj"].T + w.get(
        f"{prefix}out_proj_bias", 0.0
    )


def _act(hidden: torch.Tensor, activation: str, is_gated: bool) -> torch.Tensor:
    acts = {
        "silu": lambda v: v * v.sigmoid(),
        "relu2": lambda v: v.relu() ** 2,
        "gelu": lambda v: v * 0.5 * (1 + torch.erf(v / math.sqrt(2))),
    }
    if not is_gated:
        return acts[activation](hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return acts[activation](gate) * up


def _moe(
    moe: MoeConfig, w: Weights, x: torch.Tensor, choices: Sequence[Sequence[int]] | None
) -> torch.Tensor:
    scores = x @ w["router"].T
    scores = scores.sigmoid() if moe.score == "sigmoid" else scores.softmax(-1)
    experts_in = x @ w["latent_in"].T if moe.latent_size else x
    biased = scores + w.get("score_bias", 0.0)
    chosen = [_choose(moe, choice) for choice in biased]
    if choices is not None:
        chosen = [_follow(moe, *pair) for pair in zip(biased, chosen, choices, strict=True)]
    y = torch.stack([_token_experts(moe, w, experts_in[t], scores[t], chosen[t]) for t in range(len(x))])
    if moe.latent_size:
        y = y @ w["latent_out"].T
    if moe.shared_intermediate_size:
        y = y + _act(x @ w["shared_in"].T, moe.activation, moe.is_gated) @ w["shared_out"].T
    return y


def _choose(moe: MoeConfig, choice: torch.Tensor) -> list[int]:
    """The experts of a token with these biased scores [E]."""
    group_size = moe.num_experts // moe.num_groups
    best_two = [
        choice[g * group_size : (g + 1) * group_size].topk(min(2, group_size)).values.sum()
        for g in range(moe.num_groups)
    ]
    kept_groups = sorted(range(moe.num_groups), key=lambda g: -float(best_two[g]))[: moe.topk_group]
    allowed = [e for e in range(moe.num_experts) if e // group_size in kept_groups]
    return sorted(allowed, key=lambda e: -float(choice[e]))[: moe.top_k]


def _follow(moe: MoeConfig, choice: torch.Tensor, own: list[int], other: Sequence[int]) -> list[int]:
    """The other's experts, which the scores must give too when each moves by half of TIED_SCORES."""
    if set(own) == set(other):
        return own
    moved = choice - TIED_SCORES / 2
    moved[list(other)] += TIED_SCORES
    assert set(_choose(moe, moved)) == set(other), (
        f"{sorted(other)} is no near tie of {sorted(own)}: {choice}"
    )
    return list(other)


def _token_experts(
    moe: MoeConfig, w: Weights, x: torch.Tensor, scores: torch.Tensor, chosen: Sequence[int]
) -> torch.Tensor:
    total = sum(float(scores[e]) for e in chosen) if moe.normalise else 1.0
    y = torch.zeros(w["expert_out"].shape[1], dtype=torch.float64)
    for e in chosen:
        hidden = _act(w["expert_in"][e] @ x, moe.activation, moe.is_gated)
        y += float(scores[e]) / total * moe.scale * (w["expert_out"][e] @ hidden)
    return y
