"""Token embedding and output head, tied or not."""

from __future__ import annotations

import torch

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

    def __init__(self, params: Params, divisor: float) -> None:
        self.table = params.get("head", params["embedding"])  # [V, C]
        self.divisor = divisor

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [Rs, C] -> [Rs, V] float32."""
        logits = torch.nn.functional.linear(hidden, self.table).float()
        return logits if self.divisor == 1.0 else logits.div_(self.divisor)
