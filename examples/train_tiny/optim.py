"""Muon for the hidden matrices, AdamW for everything else. Knows no model beyond parameter shapes and names.

Source of Muon: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of the paper
NUM_ITERATIONS = 5


def orthogonalise(batch: Tensor) -> Tensor:
    """[n, rows, cols] -> matrices of the same singular vectors with singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor = batch.bfloat16() if batch.is_cuda else batch
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(x.dtype) + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = x.mT if is_tall else x
    return out.to(batch.dtype)


class Muon:
    """Momentum whose update is orthogonalised, all matrices of a shape in one batch."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], weight_decay: float, momentum: float = 0.95
    ) -> None:
        self.weight_decay, self.momentum = weight_decay, momentum
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for p in parameters:
            self.groups.setdefault(tuple(p.shape[-2:]), []).append(p)
        self.buffers = {id(p): torch.zeros_like(p) for p in parameters}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for (rows, cols), members in self.groups.items():
            updates = [self._momentum(p).reshape(-1, rows, cols) for p in members]
            orthogonal = orthogonalise(torch.cat(updates)) * max(1.0, rows / cols) ** 0.5
            for p, update in zip(members, orthogonal.split([u.shape[0] for u in updates]), strict=True):
                p.mul_(1 - lr * self.weight_decay).add_(update.reshape(p.shape), alpha=-lr)

    def _momentum(self, p: nn.Parameter) -> Tensor:
        if p.grad is None:
            raise ValueError("a matrix received no gradient")
        buffer = self.buffers[id(p)]
        buffer.lerp_(p.grad, 1 - self.momentum)
        return p.grad.lerp(buffer, self.momentum)  # Nesterov


@dataclass(frozen=True)
class Optimisers:
    muon: Muon
    adam: torch.optim.AdamW
    muon_lr: float
    adam_lr: float

    @classmethod
    def build(cls, model: nn.Module, muon_lr: float, adam_lr: float, weight_decay: float) -> Optimisers:
        """Matrices inside the layers go to Muon; embedding, head and router decay under AdamW, vectors do not."""
        matrices: list[nn.Parameter] = []
        tables: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for name, p in model.named_parameters():
            is_table = name.startswith(("embeddings", "lm_head")) or name.endswith("gate.weight")
            is_vector = p.ndim < 2 or "conv1d" in name
            (vectors if is_vector else tables if is_table else matrices).append(p)
        groups = [
            {"params": tables, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10)
        return cls(Muon(matrices, weight_decay), adam, muon_lr, adam_lr)

    def step(self, scale: float) -> None:
        """One update at `scale` times the peak learning rates; clears the gradients."""
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.muon.step(self.muon_lr * scale)
        self.adam.step()
        for members in self.muon.groups.values():
            for p in members:
                p.grad = None
        self.adam.zero_grad(set_to_none=True)
