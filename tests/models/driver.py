"""Drives a model step by step without the engine: builds each `StepBatch` by hand, for ragged rows and chunks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from headway.engine.batch import StepBatch
from headway.models.caches import ModelCaches
from headway.models.hybrid import HybridModel

BLOCK_SIZE = 4


@dataclass
class Row:
    """One sequence: what it holds in memory and how far it is computed."""

    row: int
    slot: int
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0


class Driver:
    """Rows get scattered blocks and slots; fresh state slots hold NaN, which a row's start must not read."""

    def __init__(self, model: HybridModel, *, max_rows: int = 6, max_len: int = 256) -> None:
        self.model = model
        max_blocks = -(-max_len // BLOCK_SIZE)
        num_blocks, num_slots = max_rows * max_blocks + 1, max_rows + 1
        self.caches = ModelCaches.allocate(
            model.config, num_blocks, BLOCK_SIZE, num_slots, model.dtype, model.device
        )
        for state in (*self.caches.conv_state, *self.caches.ssm_state):
            state[1:] = torch.nan
        self.block_table = torch.zeros(max_rows + 1, max_blocks, dtype=torch.int32, device=model.device)
        shuffle = random.Random(0)
        self.free_blocks = shuffle.sample(range(1, num_blocks), num_blocks - 1)
        self.free_slots = shuffle.sample(range(1, num_slots), num_slots - 1)
        self.rows: list[Row] = []
        self.num_steps = 0

    def add_row(self) -> Row:
        row = Row(row=len(self.rows) + 1, slot=self.free_slots.pop())
        self.rows.append(row)
        return row

    def step(self, work: list[tuple[Row, list[int]]]) -> list[torch.Tensor]:
        """Runs the tokens of each row and returns their logits [n, V], in the order given."""
        starts = [row.num_computed for row, _ in work]
        lengths = [len(tokens) for _, tokens in work]
        for row, tokens in work:
            self._grow(row, row.num_computed + len(tokens))
        hidden = self.model.forward(self._batch(work, starts, lengths), self.caches)
        for row, tokens in work:
            row.num_computed += len(tokens)
        return list(self.model.logits(hidden).split(lengths))

    def _grow(self, row: Row, num_tokens: int) -> None:
        while len(row.blocks) * BLOCK_SIZE < num_tokens:
            row.blocks.append(self.free_blocks.pop())
            self.block_table[row.row, len(row.blocks) - 1] = row.blocks[-1]

    def _batch(self, work: list[tuple[Row, list[int]]], starts: list[int], lengths: list[int]) -> StepBatch:
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        query_start = [0]
        for length in lengths:
            query_start.append(query_start[-1] + length)
        self.num_steps += 1
        return StepBatch(
            step=self.num_steps,
            num_rows=len(work),
            num_decode_rows=0,
            num_sampled=len(work),
            num_tokens=query_start[-1],
            max_query_len=max(lengths),
            max_kv_len=max(ends),
            token_ids=self._ints([token for _, tokens in work for token in tokens]),
            positions=self._ints(
                [p for start, end in zip(starts, ends, strict=True) for p in range(start, end)]
            ),
            token_rows=self._ints([r for r, length in enumerate(lengths) for _ in range(length)]),
            rows=self._ints([row.row for row, _ in work]),
            query_start=self._ints(query_start),
            row_start=self._ints(starts),
            kv_lens=self._ints(ends),
            read_slots=self._ints([row.slot for row, _ in work]),
            write_slots=self._ints([row.slot for row, _ in work]),
            state_base=self._ints(starts),
            sample_tokens=self._ints([end - 1 for end in query_start[1:]]),
            block_table=self.block_table,
        )

    def _ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.model.device)


@dataclass
class Greedy:
    """What `generate` produced for one prompt."""

    tokens: list[int]
    logits: torch.Tensor  # [prompt + new - 1, V], of every position that was computed


def generate(
    model: HybridModel, prompts: list[list[int]], num_new: int, *, chunk: int | None = None
) -> list[Greedy]:
    """Greedy continuation of all prompts at once; prompts go in whole, or in pieces of `chunk` tokens.

    A short prompt starts to decode while a longer one is still being read, so steps mix both.
    """
    driver = Driver(model, max_rows=len(prompts), max_len=max(map(len, prompts)) + num_new)
    rows = [driver.add_row() for _ in prompts]
    pending = [list(prompt) for prompt in prompts]
    results = [Greedy([], torch.empty(0)) for _ in prompts]
    seen: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(len(result.tokens) < num_new for result in results):
        work, owners = [], []
        for index, row in enumerate(rows):
            if len(results[index].tokens) < num_new:
                piece = pending[index][: chunk or len(pending[index])]
                del pending[index][: len(piece)]
                work.append((row, piece))
                owners.append(index)
        for index, logits in zip(owners, driver.step(work), strict=True):
            seen[index].append(logits)
            if not pending[index]:
                token = int(logits[-1].argmax())
                results[index].tokens.append(token)
                pending[index] = [token]
    for result, parts in zip(results, seen, strict=True):
        result.logits = torch.cat(parts)
    return results
