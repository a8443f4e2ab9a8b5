"""Token embedding and output head, tied or not."""

from __future__ import annotations

import torch

from headway.layers.linear import Linear
from headway.layers.params import Params, ParamSpec


def embedding_specs(vocab_size: int, hidden_size: int, is_tied: bool) -> dict[str, ParamSpec]:
    specs = {"embedding": ParamSpec((vocab_size, hidden_size), "embedding")}
    if not is_tied:
        specs["head"] = ParamSpec((vocab_size, hidden_size))
    return specs


class Embedding:
    """Rows of the table, scaled (Granite) or not."""

    def __init__(self, params: Params, multiplier: float) -> None:
        self.table = params["embedding"]  # [V, C]
        self.multiplier = multiplier

    def __call__(self, token_ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """token_ids [T] int32 -> out [T, C]."""
        torch.index_select(self.table, 0, token_ids, out=out)
        return out if self.multiplier == 1.0 else out.mul_(self.multiplier)


class Head:
    """Logits of chosen tokens; the embedding's own table where tied."""

    def __init__(self, params: Params, divisor: float, is_invariant: bool = False) -> None:
        # a tied table stays plain for the look-up: a packed copy would double it
        is_tied = "head" not in params
        self.linear = Linear(  # [V, C]
            params["embedding" if is_tied else "head"], may_pack=not is_tied, is_invariant=is_invariant
        )
        self.divisor = divisor

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [Rs, C] -> [Rs, V] float32."""
        logits = self.linear(hidden).float()
        return logits if self.divisor == 1.0 else logits.div_(self.divisor)
