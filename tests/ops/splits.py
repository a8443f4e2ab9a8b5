"""Cutting the rows of a step into pieces, to compare a prompt computed whole with one computed in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.cases import Rows


@dataclass(frozen=True)
class Piece:
    """One call: some tokens of some rows."""

    rows: Rows
    row_indices: list[int]
    tokens: Tensor  # [T of the piece] indices into the whole step's tokens

    def bounds(self, device: str) -> dict[str, Tensor]:
        starts = torch.tensor([0, *self.rows.lengths]).cumsum(0)
        return {
            "query_start": starts.int().to(device),
            "row_start": torch.tensor(self.rows.starts, dtype=torch.int32, device=device),
        }


def cut(rows: Rows, sizes: tuple[int, ...]) -> Iterator[Piece]:
    """Pieces of at most sizes[i] tokens a row, the last size repeated, all rows together, until none is left."""
    begins = torch.tensor([0, *rows.lengths]).cumsum(0).tolist()
    done = [0] * rows.num_rows
    sizes_left = list(sizes)
    while any(d < n for d, n in zip(done, rows.lengths, strict=True)):
        size = sizes_left.pop(0) if len(sizes_left) > 1 else sizes_left[0]
        active = [r for r in range(rows.num_rows) if done[r] < rows.lengths[r]]
        counts = [min(size, rows.lengths[r] - done[r]) for r in active]
        starts = tuple(rows.starts[r] + done[r] for r in active)
        tokens = [begins[r] + done[r] + i for r, n in zip(active, counts, strict=True) for i in range(n)]
        for r, n in zip(active, counts, strict=True):
            done[r] += n
        yield Piece(Rows(tuple(counts), starts), active, torch.tensor(tokens))


def alone(rows: Rows) -> Iterator[Piece]:
    """Every row in a call of its own."""
    begins = torch.tensor([0, *rows.lengths]).cumsum(0).tolist()
    for r, (n, start) in enumerate(zip(rows.lengths, rows.starts, strict=True)):
        yield Piece(Rows((n,), (start,)), [r], torch.arange(begins[r], begins[r] + n))


def pieces_of(rows: Rows) -> dict[str, list[Piece]]:
    return {
        "alone": list(alone(rows)),
        "token by token": list(cut(rows, (1,))),
        "odd chunks": list(cut(rows, (7, 3, 13))),
        "tile and rest": list(cut(rows, (16, 100))),
    }
