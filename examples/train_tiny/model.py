"""The tiny Nemotron-H model for training: plain torch with autograd, whole sequences, no caches.

Mathematically what Headway and transformers compute for the exported checkpoint. Knows no files and no optimiser.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.train_tiny.settings import TinyShape
from examples.train_tiny.ssd import ssd


class Losses(NamedTuple):
    """Mean nats a token: next token, and the token after it from the multi-token-prediction layer."""

    next_token: Tensor
    second_token: Tensor


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, group_size: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.group_size = eps, group_size or size

    def forward(self, x: Tensor) -> Tensor:
        groups = x.float().reshape(*x.shape[:-1], -1, self.group_size)
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.reshape(x.shape)


def _linear(fan_in: int, fan_out: int, gain: float = 1.0) -> nn.Linear:
    linear = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(linear.weight, std=gain / math.sqrt(fan_in))
    return linear


class Mamba2(nn.Module):
    def __init__(self, shape: TinyShape, out_gain: float) -> None:
        super().__init__()
        self.shape = shape
        heads = shape.mamba_heads
        self.in_proj = _linear(shape.hidden_size, shape.in_proj_dim)
        self.conv1d = nn.Conv1d(shape.conv_dim, shape.conv_dim, shape.conv_width, groups=shape.conv_dim)
        self.norm = RMSNorm(shape.d_inner, shape.norm_eps, shape.d_inner // shape.mamba_groups)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        dt = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        self.D = nn.Parameter(torch.ones(heads))
        self.out_proj = _linear(shape.d_inner, shape.hidden_size, out_gain)

    def forward(self, u: Tensor) -> Tensor:
        s = self.shape
        z, xbc, dt = torch.split(self.in_proj(u), [s.d_inner, s.conv_dim, s.mamba_heads], dim=-1)
        x, B, C = torch.split(self._conv(xbc), [s.d_inner, *(2 * [s.mamba_groups * s.state_size])], dim=-1)
        y = self._scan(x, B, C, dt)
        out: Tensor = self.out_proj(self.norm(y * F.silu(z.float())).to(u.dtype))
        return out

    def _conv(self, xbc: Tensor) -> Tensor:
        """Causal depthwise convolution as a sum of shifted copies: its weight gradient is a plain reduction."""
        num_tokens, width = xbc.shape[1], self.shape.conv_width
        padded = F.pad(xbc, (0, 0, width - 1, 0))
        taps = self.conv1d.weight[:, 0].to(xbc.dtype)  # [conv_dim, W]
        assert self.conv1d.bias is not None  # Conv1d's default
        out = self.conv1d.bias.to(xbc.dtype)
        for tap in range(width):
            out = out + padded[:, tap : tap + num_tokens] * taps[:, tap]
        return F.silu(out)

    def _scan(self, x: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> Tensor:
        s = self.shape
        with torch.autocast(x.device.type, enabled=False):
            heads = x.float().reshape(*x.shape[:-1], s.mamba_heads, s.mamba_head_dim)
            groups = (*x.shape[:-1], s.mamba_groups, s.state_size)
            B, C = B.float().reshape(groups), C.float().reshape(groups)
            step = F.softplus(dt.float() + self.dt_bias)
            y = ssd(heads, step, -self.A_log.exp(), B, C, s.chunk_size)
            return torch.flatten(y + heads * self.D[:, None], -2)


class Attention(nn.Module):
    """Causal grouped-query attention without position embedding."""

    def __init__(self, shape: TinyShape, out_gain: float) -> None:
        super().__init__()
        self.shape = shape
        q_dim, kv_dim = shape.attention_heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = _linear(shape.hidden_size, q_dim)
        self.k_proj = _linear(shape.hidden_size, kv_dim)
        self.v_proj = _linear(shape.hidden_size, kv_dim)
        self.o_proj = _linear(q_dim, shape.hidden_size, out_gain)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).view(*x.shape[:-1], -1, self.shape.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        repeats = self.shape.attention_heads // self.shape.kv_heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(-2))
        return out


class Mlp(nn.Module):
    def __init__(self, shape: TinyShape, size: int, out_gain: float) -> None:
        super().__init__()
        self.up_proj = _linear(shape.hidden_size, size)
        self.down_proj = _linear(size, shape.hidden_size, out_gain)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.relu(self.up_proj(x)).square())
        return out


class Router(nn.Module):
    """Sigmoid scores; the bias only chooses, and is moved towards an even load after each step.

    Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 2.1.2 (balance without auxiliary loss).
    """

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, shape: TinyShape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(
            torch.randn(shape.num_experts, shape.hidden_size) / math.sqrt(shape.hidden_size)
        )
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.num_experts))
        self.register_buffer("load", torch.zeros(shape.num_experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Weights [..., E] of the chosen experts, zero elsewhere."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        chosen = (scores + self.e_score_correction_bias).topk(self.shape.experts_per_token, dim=-1).indices
        mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        if self.training:
            self.load.copy_(mask.detach().flatten(0, -2).mean(0))
        weights = scores * mask
        return self.shape.routed_scale * weights / (weights.sum(-1, keepdim=True) + 1e-20)

    @torch.no_grad()
    def balance(self, step: float) -> None:
        self.e_score_correction_bias += step * torch.sign(self.load.mean() - self.load)


class Moe(nn.Module):
    """All experts as one wide MLP whose hidden units are weighted by the router: dense, yet exactly top-k."""

    def __init__(self, shape: TinyShape, out_gain: float) -> None:
        super().__init__()
        num, size, hidden = shape.num_experts, shape.expert_size, shape.hidden_size
        self.gate = Router(shape)
        self.up = nn.Parameter(torch.randn(num, size, hidden) / math.sqrt(hidden))
        self.down = nn.Parameter(torch.randn(num, hidden, size) * out_gain / math.sqrt(size))
        self.shared_experts = Mlp(shape, shape.shared_expert_size, out_gain)

    def forward(self, x: Tensor) -> Tensor:
        units = F.relu(F.linear(x, self.up.flatten(0, 1))).square()
        weights = self.gate(x).to(units.dtype).repeat_interleave(self.up.shape[1], dim=-1)
        routed = F.linear(units * weights, self.down.transpose(0, 1).flatten(1))
        shared: Tensor = self.shared_experts(x)
        return routed + shared


class Block(nn.Module):
    """x + mixer(norm(x)); the first block of the prediction layer also fuses, its last also norms."""

    def __init__(self, letter: str, shape: TinyShape, out_gain: float, dropout: float) -> None:
        super().__init__()
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.dropout = dropout
        self.mixer: nn.Module
        match letter:
            case "M":
                self.mixer = Mamba2(shape, out_gain)
            case "*":
                self.mixer = Attention(shape, out_gain)
            case "-":
                self.mixer = Mlp(shape, shape.mlp_size, out_gain)
            case "E":
                self.mixer = Moe(shape, out_gain)
            case _:
                raise ValueError(f"pattern letter {letter!r} is not one of M, *, -, E")

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(self.norm(x).to(x.dtype))
        return x + F.dropout(y, self.dropout, self.training)


class MtpStack(nn.Module):
    """Predicts token t+2 from the trunk's last hidden state at t and the embedding of token t+1."""

    def __init__(self, shape: TinyShape, out_gain: float, dropout: float) -> None:
        super().__init__()
        self.enorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.hnorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.eh_proj = _linear(2 * shape.hidden_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(c, shape, out_gain, dropout) for c in shape.mtp_pattern)
        self.final_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1).to(hidden.dtype))
        for layer in self.layers:
            x = layer(x)
        normed: Tensor = self.final_layernorm(x)
        return normed


class TinyModel(nn.Module):
    def __init__(self, shape: TinyShape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        out_gain = 1 / math.sqrt(2 * len(shape.pattern))
        self.embeddings = nn.Embedding(shape.vocab_size, shape.hidden_size)
        nn.init.normal_(self.embeddings.weight, std=shape.hidden_size**-0.5)
        self.layers = nn.ModuleList(Block(c, shape, out_gain, dropout) for c in shape.pattern)
        self.norm_f = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        self.mtp = MtpStack(shape, out_gain, dropout)

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens [batch, T] -> final normed hidden states [batch, T, C]."""
        x = F.dropout(self.embeddings(tokens), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x)
        normed: Tensor = self.norm_f(x)
        return normed

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [batch, T] -> [batch, T, V]."""
        return F.linear(self.hidden(tokens), self.lm_head.weight)

    def forward(self, window: Tensor) -> Losses:
        """window [batch, T + 2]: T inputs and the two tokens after them."""
        hidden = self.hidden(window[:, :-2])
        second = self.mtp(hidden, self.embeddings(window[:, 1:-1]))
        return Losses(self._loss(hidden, window[:, 1:-1]), self._loss(second, window[:, 2:]))

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, self.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def routers(self) -> list[Router]:
        return [m for m in self.modules() if isinstance(m, Router)]
