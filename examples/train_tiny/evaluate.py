"""Bits per byte on token streams. Knows the model and nothing of files or training."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.train_tiny.model import TinyModel


@torch.no_grad()
def token_nats(model: TinyModel, stream: Tensor, context: int, stride: int, batch: int = 8) -> Tensor:
    """Nats of every token of `stream` [n], float64 [n] on the CPU, each predicted once; 0 for the first token.

    Windows of `context` tokens start every `stride` tokens; a window scores only its last `stride` predictions (the
    first window all), so a token sees at least `context - stride` tokens before it wherever there are that many.
    """
    was_training = model.training
    model.eval()
    starts = list(range(0, max(1, len(stream) - 1), stride))
    nats, scored_to = torch.zeros(len(stream), dtype=torch.float64), 1
    for first in range(0, len(starts), batch):
        rows = starts[first : first + batch]
        logp = _log_probs(model, stream, rows, context)
        for row, start in enumerate(rows):
            end = min(start + context, len(stream) - 1)  # predictions of tokens start + 1 .. end
            begin = scored_to - start - 1
            nats[scored_to : end + 1] = -logp[row, begin : end - start].double().cpu()
            scored_to = max(scored_to, end + 1)
    model.train(was_training)
    return nats


def stream_nats(model: TinyModel, stream: Tensor, context: int, stride: int) -> float:
    """Total nats of `stream` but its first token; windows as in `token_nats`."""
    return token_nats(model, stream, context, stride).sum().item()


def _log_probs(model: TinyModel, stream: Tensor, starts: list[int], context: int) -> Tensor:
    """[len(starts), context] log-probabilities of the tokens after each window position; padded windows are fine."""
    longest = min(context, len(stream) - 1 - starts[0])
    windows = torch.stack(
        [F.pad(w := stream[s : s + longest + 1], (0, longest + 1 - len(w))) for s in starts]
    )
    logits = model.logits(windows[:, :-1]).float()
    picked = logits.gather(-1, windows[:, 1:, None]).squeeze(-1)
    return picked - logits.logsumexp(-1)


def bits_per_byte(nats: float, num_bytes: int) -> float:
    return nats / math.log(2) / num_bytes
