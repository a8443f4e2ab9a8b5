"""A model whose next token is a hash of every token before it, read back through its blocks and its slot.

One wrong block, slot, position or row and the hash, so the output, is another. `expected_tokens` computes the same
from the prompt alone, without any engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from headway import _core
from headway.engine.batch import StepBatch
from headway.engine.engine import Engine
from headway.engine.runner import Runner
from headway.engine.stages import with_poisoned_slots
from headway.sampling.limits import RequestLimits

VOCAB_SIZE = 61
EOS = 1
POISON = 2  # makes the logits of its sequence NaN
_MASK = 2**31 - 1


def next_hash(state: int, token: int) -> int:
    return (state * 1_103_515_245 + token * 12_345 + 7) & _MASK


def logits_of(state: int, keys: Sequence[int]) -> np.ndarray:
    """[V] float32: NaN when the sequence was poisoned, else drawn from the hash of state and keys."""
    if POISON in keys:
        return np.full(VOCAB_SIZE, np.nan, dtype=np.float32)
    mixed = state ^ hash(tuple(keys)) & _MASK
    logits = np.random.default_rng(mixed).standard_normal(VOCAB_SIZE).astype(np.float32)
    logits[POISON] = -100.0  # only a prompt brings it in
    return logits


def sequence_logits(tokens: Sequence[int]) -> np.ndarray:
    """[V] logits after `tokens`."""
    state = 0
    for token in tokens:
        state = next_hash(state, token)
    return logits_of(state, tokens)


def expected_tokens(prompt: Sequence[int], num_tokens: int, *, stops_at: int | None = EOS) -> list[int]:
    """What greedy decoding of the fake model gives."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + num_tokens:
        tokens.append(int(np.argmax(sequence_logits(tokens))))
        if tokens[-1] == stops_at:
            break
    return tokens[len(prompt) :]


@dataclass
class FakeCaches:
    keys: torch.Tensor  # [num_blocks, S] int64
    state: torch.Tensor  # [num_slots, 2] float64: the hash, exact below 2**53, and of how many tokens it is
    state_log: tuple[torch.Tensor, ...] = ()  # states are kept in place

    @property
    def state_pools(self) -> tuple[torch.Tensor, ...]:
        return (self.state[None],)


def snapshots_of(batch: StepBatch, row: int) -> dict[int, int]:
    """Slots by position."""
    if batch.snapshots is None:
        return {}
    starts, positions, slots = batch.snapshots
    mine = slice(int(starts[row]), int(starts[row + 1]))
    return dict(zip(positions[mine].tolist(), slots[mine].tolist(), strict=True))


@dataclass
class FakeModel:
    """Implements `StepModel`. `fail_at` names the step whose forward raises; `before_step` runs in each forward."""

    fail_at: int = -1
    before_step: object = None
    has_all_logits: bool = False  # at every token, as scoring a prompt needs them
    forgets_to_restore: bool = False  # rows go on from their own slot whatever the step says
    step_sizes: list[int] = field(default_factory=list)
    sampled: dict[int, np.ndarray] = field(default_factory=dict)

    def forward(self, batch: StepBatch, caches: FakeCaches) -> torch.Tensor:
        if callable(self.before_step):
            self.before_step()
        if batch.step == self.fail_at:
            raise RuntimeError("the device caught fire")
        self.step_sizes.append(batch.num_tokens)
        hidden = torch.zeros(batch.num_tokens, 1, dtype=torch.int64)
        for row in range(batch.num_rows):
            self._run_row(batch, caches, hidden, row)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.sampled[int(handle)] for handle in hidden[:, 0]]))

    def _state_before(self, start: int, table: list[int], read_slot: int, caches: FakeCaches) -> int:
        """From the slot; in a model without slots, which keeps keys alone, from those."""
        if len(caches.state) > 1:
            return 0 if start == 0 else self._load(caches.state[read_slot], start)
        state, block_size = 0, caches.keys.shape[1]
        for p in range(start):
            state = next_hash(state, int(caches.keys[table[p // block_size], p % block_size]))
        return state

    def _load(self, kept: torch.Tensor, start: int) -> int:
        """Of a poisoned slot the integer of NaN, which raises."""
        state, num_tokens = (int(number) for number in kept)
        assert num_tokens == start or self.forgets_to_restore, (
            f"the state after {num_tokens} tokens is read for {start}"
        )
        return state

    def _run_row(self, batch: StepBatch, caches: FakeCaches, hidden: torch.Tensor, row: int) -> None:
        begin, end = int(batch.query_start[row]), int(batch.query_start[row + 1])
        slots = batch.write_slots if self.forgets_to_restore else batch.read_slots
        read_slot, start = int(slots[row]), int(batch.row_start[row])
        table = batch.block_table[int(batch.rows[row])].tolist()
        block_size = caches.keys.shape[1]
        state = self._state_before(start, table, read_slot, caches)
        wanted = snapshots_of(batch, row)
        for place in range(begin, end):
            position, token = int(batch.positions[place]), int(batch.token_ids[place])
            assert position == start + place - begin
            state = next_hash(state, token)
            if position + 1 in wanted:
                caches.state[wanted[position + 1]] = torch.tensor([state, position + 1])
            caches.keys[table[position // block_size], position % block_size] = token
            if place == end - 1 or self.has_all_logits:
                keys = [int(caches.keys[table[p // block_size], p % block_size]) for p in range(position + 1)]
                hidden[place, 0] = len(self.sampled)
                self.sampled[len(self.sampled)] = logits_of(state, keys)
        caches.state[int(batch.write_slots[row])] = torch.tensor([state, start + end - begin])


@dataclass
class Harness:
    engine: Engine
    model: FakeModel
    runner: Runner

    @property
    def ledger(self) -> _core.Ledger:
        return self.engine.ledger


def make_engine(
    *,
    max_rows: int = 8,
    num_blocks: int = 64,
    block_size: int = 4,
    num_slots: int | None = None,
    max_model_len: int = 64,
    max_step_tokens: int = 32,
    launch_depth: int = 0,
    max_scored_tokens: int = 6,
    row_buckets: Sequence[int] = (),
    num_snapshots: int | None = None,
    num_waypoints: int = 0,
    snapshot_stride_tokens: int = 0,
    decode_snapshot_stride_tokens: int = 0,
    forgets_to_restore: bool = False,
    seed: int = 0,
    fail_at: int = -1,
    before_step: object = None,
    has_all_logits: bool = False,
    has_poison: bool = False,
    **engine_options: object,
) -> Harness:
    """An engine over the fake model, without tokenizer; with a prefix cache where num_snapshots is given."""
    num_slots = (max_rows if num_slots is None else num_slots) + (num_snapshots or 0)
    config = _core.LedgerConfig(
        max_rows=max_rows,
        num_blocks=num_blocks,
        block_size=block_size,
        num_slots=num_slots,
        max_model_len=max_model_len,
        max_step_tokens=max_step_tokens,
        vocab_size=VOCAB_SIZE,
        max_logprobs=5,
        max_launch_depth=launch_depth,
        max_scored_tokens=max_scored_tokens,
        use_prefix_cache=num_snapshots is not None,
        max_snapshots=num_snapshots or 0,
        max_waypoints=num_waypoints,
        snapshot_stride_tokens=snapshot_stride_tokens,
        decode_snapshot_stride_tokens=decode_snapshot_stride_tokens,
    )
    model = FakeModel(
        fail_at=fail_at,
        before_step=before_step,
        has_all_logits=has_all_logits,
        forgets_to_restore=forgets_to_restore,
    )
    caches = FakeCaches(
        keys=torch.full((num_blocks + 1, block_size), -1, dtype=torch.int64),
        state=torch.full((num_slots + 1, 2), -1, dtype=torch.float64),
    )
    runner = Runner(model, caches, config, torch.device("cpu"), row_buckets=row_buckets)
    limits = RequestLimits(
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        max_logprobs=5,
        max_stop_ids=_core.MAX_STOP_IDS,
        max_logit_bias=_core.MAX_LOGIT_BIAS,
        max_bad_word_entries=_core.MAX_BAD_WORD_ENTRIES,
        eos_token_ids=(EOS,),
    )
    staging = runner.staging
    ledger = _core.Ledger(config, staging.packet_ring_address, staging.result_ring_address)
    engine = Engine(ledger, runner, limits, seed=seed, **engine_options)
    if has_poison:
        engine.stages = with_poisoned_slots(engine.stages, ledger, runner.poison_slots)
    return Harness(engine, model, runner)
