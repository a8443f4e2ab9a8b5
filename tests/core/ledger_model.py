"""What the ledger must look like from outside, in plain Python: no rows, blocks or plans of its own.

Where the ledger is free to choose (who is evicted under pressure, how far it grants ahead) the model knows bounds; all
else it knows exactly: tokens, ends, states, counts, and who may be admitted before whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headway import _core
from tests.core.fake_device import NextToken, Packet


@dataclass
class ModelRequest:
    """One request. `holds_row` is None where only the ledger knows: it may have been evicted under pressure."""

    id: int
    priority: int
    prompt: list[int]
    max_total_len: int
    stop_ids: list[int]
    min_tokens: int
    outputs: list[int] = field(default_factory=list)
    reason: int = _core.NOT_FINISHED
    is_paused: bool = False
    holds_row: bool | None = False
    num_outputs_since_admission: int = 0
    salt: bytes = b""

    @property
    def rank(self) -> tuple[int, int]:
        return (self.priority, self.id)

    @property
    def is_over(self) -> bool:
        return self.reason != _core.NOT_FINISHED

    def end_with(self, token: int) -> int:
        """Why the sequence ends when `token` follows, before it is appended."""
        if token in self.stop_ids and len(self.outputs) >= self.min_tokens:
            return _core.FINISH_STOP
        is_full = len(self.prompt) + len(self.outputs) + 1 >= self.max_total_len
        return _core.FINISH_LENGTH if is_full else _core.NOT_FINISHED


class LedgerModel:
    """Follows a ledger call by call; each method asserts that what the ledger answered is right."""

    def __init__(self, config: _core.LedgerConfig, next_token: NextToken) -> None:
        self.config = config
        self.next_token = next_token
        self.requests: dict[int, ModelRequest] = {}
        self.num_forced_evictions = 0
        self.num_seen_evictions = 0
        self._live: list[tuple[int, int]] = []  # (row, request id) of the newest packet
        self._ids_by_row: dict[int, int] = {}

    @property
    def unfinished(self) -> list[ModelRequest]:
        return [request for request in self.requests.values() if not request.is_over]

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size) if self.config.num_blocks else 0

    def fits(self, prompt_len: int, max_new_tokens: int) -> bool:
        """Whether such a request could ever run."""
        total = min(prompt_len + max_new_tokens, self.config.max_model_len)
        is_short = prompt_len < self.config.max_model_len
        return is_short and self.blocks_for(total - 1) <= self.config.num_blocks

    def added(self, request: ModelRequest) -> None:
        assert request.id == len(self.requests) + 1, "ids count up, and refused requests take none"
        self.requests[request.id] = request

    def planned(self, plan: _core.Plan | None, num_evictions: int) -> None:
        """Args: the plan, and how many evictions the ledger has counted since its beginning."""
        waiting = sorted((r for r in self.unfinished if r.holds_row is False and not r.is_paused), key=_rank)
        if num_evictions > self.num_seen_evictions:
            for request in self.unfinished:
                request.holds_row = None if request.holds_row else request.holds_row
        self.num_seen_evictions = num_evictions
        if plan is None:
            return
        assert plan.num_tokens <= self.config.max_step_tokens
        assert plan.num_decode_rows <= plan.num_sampled <= plan.num_rows <= self.config.max_rows
        if plan.packet_address:
            self._read_packet(Packet(plan.packet_address, plan.packet_bytes), plan, waiting)
        assert len(self._live) == plan.num_rows
        for _, request_id in self._live:
            assert not self.requests[request_id].is_over, "a request that is over is planned"
            assert not self.requests[request_id].is_paused, "a paused request is planned"

    def _read_packet(self, packet: Packet, plan: _core.Plan, waiting: Sequence[ModelRequest]) -> None:
        admitted = [int(init["sampling"]["seed"]) for init in packet.inits]
        for init, request_id in zip(packet.inits, admitted, strict=True):
            request = self.requests[request_id]
            assert not request.is_over, "a request that is over is admitted"
            assert not request.is_paused, "a paused request is admitted"
            assert request.holds_row is not True, "a request is admitted twice"
            request.holds_row = True
            request.num_outputs_since_admission = 0
            self._ids_by_row[int(init["row"])] = request_id
        # Who waits for what a running prompt is about to leave in the cache lets others pass.
        is_admitted = [request.id in admitted for request in waiting if not self._may_wait(request, admitted)]
        assert is_admitted == sorted(is_admitted, reverse=True), "somebody was admitted out of turn"
        self._live = [(int(row["row"]), self._ids_by_row[int(row["row"])]) for row in packet.rows]
        decoding = [self.requests[request_id].rank for _, request_id in self._live[: plan.num_decode_rows]]
        assert decoding == sorted(decoding), "decode rows are out of order"
        assert len({row for row, _ in self._live}) == len(self._live), "a row is twice in a step"

    def _may_wait(self, request: ModelRequest, admitted: Sequence[int]) -> bool:
        if not self.config.use_prefix_cache or request.id in admitted:
            return False
        unit = self.config.prefix_unit_tokens
        tokens = request.prompt + request.outputs
        leaders = (r for r in self.unfinished if r.holds_row is not False and r.rank < request.rank)
        return any(
            leader.salt == request.salt and (leader.prompt + leader.outputs)[:unit] == tokens[:unit]
            for leader in leaders
        )

    def committed(self, commit: _core.Commit) -> None:
        for i, request_id in enumerate(commit.request_ids.tolist()):
            request = self.requests[request_id]
            token = int(commit.tokens[i])
            assert not request.is_over, "a result came after the end"
            assert token == self.next_token(request.prompt + request.outputs)
            assert commit.finish_reasons[i] == request.end_with(token)
            is_stop = commit.finish_reasons[i] == _core.FINISH_STOP
            assert commit.stop_tokens[i] == (token if is_stop else -1)
            request.outputs.append(token)
            request.num_outputs_since_admission += 1
            self.ended(request, int(commit.finish_reasons[i]))

    def ended(self, request: ModelRequest, reason: int) -> None:
        request.reason = reason
        if request.is_over:
            request.holds_row = request.is_paused = False

    def may_refuse_rewind(self, request: ModelRequest, num_positions: int) -> bool:
        """Where there is no such output, where state cannot go back, or where the first output would be dropped."""
        is_there = 0 <= num_positions <= len(request.outputs)
        return not is_there or self.config.num_slots > 0 or num_positions == len(request.outputs)

    def rewound(self, request: ModelRequest, num_positions: int) -> None:
        assert 0 <= num_positions <= len(request.outputs), "outputs were dropped that never were"
        del request.outputs[len(request.outputs) - num_positions :]

    def evicted(self, request: ModelRequest | None, answer: bool) -> None:
        """After evict(): the answer tells whether the request held a row."""
        if request is None or request.is_over or request.holds_row is not None:
            assert answer == bool(request is not None and request.holds_row)
        if answer:
            assert request is not None
            request.holds_row = False
            self.num_forced_evictions += 1
            self.num_seen_evictions += 1

    def check(self, stats: _core.Stats, cached: _core.PrefixStats, num_in_flight: int) -> None:
        """Counts that are known, and bounds of those that the ledger chooses."""
        live = self.unfinished
        assert stats.num_paused == sum(r.is_paused for r in live)
        assert stats.num_waiting + stats.num_running + stats.num_paused == len(live)
        assert stats.num_finished == len(self.requests) - len(live)
        assert stats.steps_launched - stats.steps_committed == num_in_flight
        assert stats.num_evictions >= self.num_forced_evictions
        running = [r for r in live if not r.is_paused]
        assert sum(r.holds_row is True for r in running) <= stats.num_running
        assert stats.num_running <= sum(r.holds_row is not False for r in running)
        self._check_memory(stats, cached, live, num_in_flight)

    def _check_memory(
        self, stats: _core.Stats, cached: _core.PrefixStats, live: Sequence[ModelRequest], num_in_flight: int
    ) -> None:
        certain = [r for r in live if r.holds_row is True]
        possible = [r for r in live if r.holds_row is not False]
        assert len(certain) <= self.config.max_rows
        slots_held = stats.slots_total - stats.slots_free - stats.slots_fenced
        blocks_held = stats.blocks_total - stats.blocks_free - stats.blocks_fenced
        computed = [len(r.prompt) + len(r.outputs) - 1 for r in certain if r.num_outputs_since_admission]
        if self.config.use_prefix_cache:  # requests share blocks, and the cache holds more
            assert slots_held >= (len(certain) if self.config.num_slots else 0) + cached.num_snapshots
            assert blocks_held >= max(map(self.blocks_for, computed), default=0)
            assert blocks_held >= cached.num_blocks >= cached.num_evictable_blocks
            assert cached.num_snapshots <= self.config.max_snapshots
        else:
            if self.config.num_slots:
                assert len(certain) <= slots_held <= len(possible)
            assert blocks_held <= sum(self.blocks_for(r.max_total_len - 1) for r in possible)
            assert blocks_held >= sum(map(self.blocks_for, computed))
            assert cached.num_blocks == cached.num_snapshots == 0
        if num_in_flight == 0:
            assert stats.blocks_fenced == stats.slots_fenced == 0
        if not live and num_in_flight == 0:
            assert blocks_held == cached.num_evictable_blocks
            assert slots_held == cached.num_snapshots


def _rank(request: ModelRequest) -> tuple[int, int]:
    return request.rank
