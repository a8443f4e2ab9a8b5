"""Hypothesis drives the ledger, as Python sees it, against `ledger_model.py`, with a device that runs when it likes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from headway import _core, errors
from tests.core import evidence
from tests.core.fake_device import FakeDevice, hash_token
from tests.core.ledger_model import LedgerModel, ModelRequest

VOCAB_SIZE = 24
PICKS = st.integers(0, 15)  # one of those that are not over; the largest: one that never was
END_NAMES = {_core.FINISH_STOP: "stop", _core.FINISH_LENGTH: "length", _core.FINISH_ABORT: "abort"}
REACHABLE = {"tokens", "cached tokens", "rewound", "evicted when asked", "evicted under pressure"} | {
    f"ended for {n}" for n in END_NAMES.values()
}


class LedgerMachine(RuleBasedStateMachine):
    """One ledger, its device, and the model of what may be seen."""

    reached: ClassVar[Counter[str]] = Counter()

    @initialize(
        kind=st.sampled_from(["attention", "mamba", "hybrid"]),
        max_rows=st.integers(1, 4),
        kv_tokens=st.integers(16, 40),  # little more than one request needs
        block_size=st.integers(1, 7),
        num_slots=st.integers(1, 4),
        max_step_tokens=st.integers(1, 32),
        depth=st.integers(0, 3),
        ahead=st.integers(0, 2),
        is_cached=st.booleans(),
        stride=st.integers(0, 8),
    )
    def start(
        self,
        kind: str,
        max_rows: int,
        kv_tokens: int,
        block_size: int,
        num_slots: int,
        max_step_tokens: int,
        depth: int,
        ahead: int,
        is_cached: bool,
        stride: int,
    ) -> None:
        _core.set_error_types(errors.RequestError, errors.CapacityError, errors.IntegrityError)
        self.config = _core.LedgerConfig(
            max_rows=max_rows,
            num_blocks=0 if kind == "mamba" else -(-kv_tokens // block_size),
            block_size=block_size,
            num_slots=0 if kind == "attention" else num_slots,
            max_model_len=32,
            max_step_tokens=max_step_tokens,
            vocab_size=VOCAB_SIZE,
            max_logprobs=0,
            max_launch_depth=depth,
            grant_ahead_blocks=ahead,
            use_prefix_cache=is_cached,
            max_snapshots=0 if kind == "attention" else num_slots,
            max_waypoints=0 if kind == "attention" else num_slots // 2,
            snapshot_stride_tokens=stride,
            decode_snapshot_stride_tokens=stride,
        )
        self.ledger = _core.Ledger(self.config)
        self.device = FakeDevice(self.config, self.sample)
        self.model = LedgerModel(self.config, hash_token(VOCAB_SIZE))

    def sample(self, tokens: Sequence[int]) -> int:
        return hash_token(VOCAB_SIZE)(tokens)

    @rule(
        count=st.integers(1, 4),
        prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12),
        max_new_tokens=st.integers(1, 12),
        priority=st.integers(-1, 1),
        stop_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
        min_tokens=st.integers(0, 3),
        is_alike=st.booleans(),
        salt=st.sampled_from([b"", b"tenant"]),
    )
    def add(
        self,
        count: int,
        prompt: list[int],
        max_new_tokens: int,
        priority: int,
        stop_ids: list[int],
        min_tokens: int,
        is_alike: bool,
        salt: bytes,
    ) -> None:
        min_tokens = min(min_tokens, max_new_tokens)
        total = min(len(prompt) + max_new_tokens, self.config.max_model_len)
        for _ in range(count):
            number = len(self.model.requests) + 1
            spec = _core.SamplingSpec(seed=number, stop_ids=stop_ids, min_tokens=min_tokens)
            submit = (np.array(prompt, np.int32), spec)
            if not self.model.fits(len(prompt), max_new_tokens):
                with pytest.raises(errors.CapacityError):
                    self.ledger.add(*submit, max_new_tokens=max_new_tokens, priority=priority)
                return
            limits = {"max_new_tokens": max_new_tokens, "priority": priority}
            request_id = self.ledger.add(*submit, **limits, salt=salt)
            request = ModelRequest(request_id, priority, prompt, total, stop_ids, min_tokens, salt=salt)
            self.model.added(request)
            prompt = [*prompt[:-1], number % VOCAB_SIZE] if is_alike else [number % VOCAB_SIZE, *prompt[1:]]

    @rule()
    def plan(self) -> None:
        num_before = self.ledger.num_in_flight
        plan = self.ledger.plan()
        self.model.planned(plan, self.ledger.stats().num_evictions)
        assert self.ledger.num_in_flight == num_before + (plan is not None)
        assert self.ledger.num_in_flight <= self.config.max_launch_depth + 1
        if plan is not None:
            self.device.launch(plan)

    @precondition(lambda self: self.device.num_pending)
    @rule()
    def run_device(self) -> None:
        self.device.run_one()

    @rule()
    def commit(self) -> None:
        is_ready = self.device.num_pending < self.ledger.num_in_flight
        assert self.ledger.is_ready() == is_ready
        commit = self.ledger.commit()
        assert (commit is not None) == is_ready
        if commit is not None:
            self.model.committed(commit)

    @rule(num_steps=st.integers(1, 8))
    def serve(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.plan()
            if self.device.num_pending:
                self.device.run_one()
            self.commit()

    @precondition(lambda self: len(self.model.unfinished) > 2)
    @rule(pick=PICKS)
    def abort(self, pick: int) -> None:
        request_id, request = self._pick(pick)
        assert self.ledger.abort(request_id) == (request is not None)
        if request is not None:
            self.model.ended(request, _core.FINISH_ABORT)

    @precondition(lambda self: len(self.model.unfinished) > 2)
    @rule(pick=PICKS, num_cut=st.integers(0, 3))
    def finish(self, pick: int, num_cut: int) -> None:
        request_id, request = self._pick(pick)
        num_kept = max(0, len(request.outputs) - num_cut) if request else 0
        assert self.ledger.finish(request_id, num_kept) == (request is not None)
        if request is not None:
            del request.outputs[num_kept:]
            self.model.ended(request, _core.FINISH_STOP)

    @rule(pick=PICKS)
    def finish_with_more_than_there_is(self, pick: int) -> None:
        request_id, request = self._pick(pick)
        if request is not None:
            with pytest.raises(errors.RequestError):
                self.ledger.finish(request_id, len(request.outputs) + 1)

    @rule(pick=PICKS, is_pause=st.booleans())
    def pause_or_resume(self, pick: int, is_pause: bool) -> None:
        request_id, request = self._pick(pick)
        switch = self.ledger.pause if is_pause else self.ledger.resume
        assert switch(request_id) == (request is not None and request.is_paused != is_pause)
        if request is not None:
            request.is_paused = is_pause

    @rule(pick=PICKS)
    def evict(self, pick: int) -> None:
        request_id, request = self._pick(pick)
        self.model.evicted(request, self.ledger.evict(request_id))

    @rule(pick=PICKS, num_positions=st.integers(-1, 3))
    def rewind(self, pick: int, num_positions: int) -> None:
        request_id, request = self._pick(pick)
        num_before = self.ledger.stats().num_evictions
        try:
            assert self.ledger.rewind(request_id, num_positions) == (request is not None)
        except errors.RequestError:
            assert request is not None
            assert self.model.may_refuse_rewind(request, num_positions)
            return
        if request is not None:
            self.model.rewound(request, num_positions)
            if (
                self.ledger.stats().num_evictions > num_before
            ):  # into what it was admitted with, which may be shared
                assert self.config.use_prefix_cache
                self.model.evicted(request, True)
            self.reached["rewound"] += 1

    @rule()
    def reset_prefix_cache(self) -> None:
        self.ledger.reset_prefix_cache()
        assert (
            self.ledger.prefix_stats().num_snapshots == self.ledger.prefix_stats().num_evictable_blocks == 0
        )

    @rule(pick=PICKS)
    def go_on(self, pick: int) -> None:
        """The next turn of a conversation: all its tokens and a new one."""
        over = [request for request in self.model.requests.values() if request.outputs]
        if over:
            last = over[pick % len(over)]
            prompt = [*last.prompt, *last.outputs, pick]
            if self.model.fits(len(prompt), 4):
                number = len(self.model.requests) + 1
                spec = _core.SamplingSpec(seed=number)
                tokens = np.array(prompt, np.int32)
                request_id = self.ledger.add(tokens, spec, max_new_tokens=4, salt=last.salt)
                total = min(len(prompt) + 4, self.config.max_model_len)
                self.model.added(ModelRequest(request_id, 0, prompt, total, [], 0, salt=last.salt))

    @rule(pick=PICKS)
    def read(self, pick: int) -> None:
        request_id, request = self._pick(pick)
        if request is not None:
            assert self.ledger.output_tokens(request_id).tolist() == request.outputs

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.ledger.check_integrity()
        self.model.check(self.ledger.stats(), self.ledger.prefix_stats(), self.ledger.num_in_flight)
        assert self.ledger.has_unfinished == bool(self.model.unfinished)

    def teardown(self) -> None:
        """All that is paused goes on, and all ends."""
        if not hasattr(self, "ledger"):
            return
        for request in self.model.unfinished:
            if request.is_paused:
                assert self.ledger.resume(request.id)
                request.is_paused = False
        num_left = sum(request.max_total_len for request in self.model.unfinished)
        for _ in range(32 + 16 * num_left):
            self.serve(1)
            self.counts_agree()
            if not self.model.unfinished and self.ledger.num_in_flight == 0:
                self._count()
                return
        raise AssertionError("the ledger does not come to rest")

    def _count(self) -> None:
        num_evictions = self.ledger.stats().num_evictions
        self.reached["cached tokens"] += self.ledger.prefix_stats().num_cached_tokens
        self.reached["evicted when asked"] += self.model.num_forced_evictions
        self.reached["evicted under pressure"] += num_evictions - self.model.num_forced_evictions
        for request in self.model.requests.values():
            self.reached[f"ended for {END_NAMES[request.reason]}"] += 1
        self.reached["tokens"] += sum(len(request.outputs) for request in self.model.requests.values())

    def _pick(self, pick: int) -> tuple[int, ModelRequest | None]:
        """An id, and its request unless it is over or never was."""
        unfinished = self.model.unfinished
        if pick == 15 or not unfinished:
            over = [request.id for request in self.model.requests.values() if request.is_over]
            return (over[pick % len(over)] if over and pick % 2 else len(self.model.requests) + 1, None)
        request = unfinished[pick % len(unfinished)]
        return (request.id, request)


class WrongMachine(LedgerMachine):
    """Its device samples something else than the model believes, now and then."""

    def sample(self, tokens: Sequence[int]) -> int:
        return (super().sample(tokens) + (len(tokens) > 5)) % VOCAB_SIZE


def run(machine: type[LedgerMachine], num_examples: int, num_steps: int) -> None:
    limits = settings(max_examples=num_examples, stateful_step_count=num_steps, report_multiple_bugs=False)
    machine.reached = Counter()
    run_state_machine_as_test(machine, settings=limits)
    assert all(machine.reached[name] > num_examples / 20 for name in REACHABLE), machine.reached


def test_the_ledger_is_as_its_model_says() -> None:
    run(LedgerMachine, 300, 50)


def test_the_machine_sees_a_wrong_device() -> None:
    with pytest.raises(AssertionError):
        run(WrongMachine, 200, 40)


@pytest.mark.long
def test_the_ledger_is_as_its_model_says_at_length() -> None:
    run(LedgerMachine, 2_000, 100)
    evidence.record("stateful model", {"num_examples": 2_000, "reached": dict(LedgerMachine.reached)})
