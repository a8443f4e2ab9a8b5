"""A device in numpy: reads plans and packets, writes result-ring entries, and lets a test choose the tokens.

It holds what a real device holds (mirror, KV blocks, state slots) and nothing of the ledger, so a block or slot handed
out too early, a wrong position or a lost token changes what it samples. Byte layouts: `csrc/core/step_layout.h`.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from headway import _core

NextToken = Callable[[Sequence[int]], int]
DUMMY_ROW = 0

HEADER = np.dtype(
    [("step", "i8")]
    + [(name, "i4") for name in ("num_rows", "num_decode_rows", "num_sampled", "num_tokens")]
    + [(name, "i4") for name in ("num_inits", "num_words", "num_grants", "num_prompt_tokens")]
    + [(name, "i4") for name in ("num_snapshots", "num_copies", "num_rewinds", "num_masks", "num_scored")]
    + [(name, "u4") for name in ("inits", "words", "grants", "rows", "tokens")]
    + [
        (name, "u4")
        for name in ("snapshots", "copies", "rewinds", "mask_rows", "mask_bits", "scores", "num_bytes")
    ]
    + [("reserved", "i4")]
)
SAMPLING = np.dtype(
    [("seed", "u8"), ("temperature", "f4"), ("top_p", "f4"), ("min_p", "f4"), ("top_k", "i4")]
    + [(name, "f4") for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")]
    + [(name, "i4") for name in ("prompt_len", "min_total_len", "max_total_len")]
    + [(name, "i4") for name in ("num_stop_ids", "num_logit_bias", "num_logprobs")]
    + [(name, "i4") for name in ("num_prompt_logprobs", "num_bad_words", "num_bad_word_tokens", "flags")]
    + [("reserved", "i4")],
    align=True,
)
ROW_INIT = np.dtype(
    [("row", "i4"), ("slot", "i4"), ("words_begin", "i4"), ("reserved", "i4"), ("sampling", SAMPLING)]
)
BLOCK_GRANT = np.dtype([("row", "i4"), ("index", "i4"), ("block", "i4")])
STEP_ROW = np.dtype(
    [(name, "i4") for name in ("row", "start", "num_tokens", "prompt_begin", "read_slot", "num_history")]
)
STATE_SNAPSHOT = np.dtype([(name, "i4") for name in ("row_index", "position", "slot", "reserved")])
STATE_COPY = np.dtype([(name, "i4") for name in ("src_slot", "dst_slot", "position", "reserved")])
ROW_REWIND = np.dtype([(name, "i4") for name in ("row", "num_computed", "last_token", "reserved")])
SCORED_TOKEN = np.dtype([(name, "i4") for name in ("token_index", "row", "target", "reserved")])
RESULT_HEADER = np.dtype(
    [(name, "i8") for name in ("step", "begin_ns", "end_ns")]
    + [("num_sampled", "i4"), ("num_scored", "i4"), ("reserved", "i4", (8,))]
)
RESULT_ROW = np.dtype(
    [("row", "i4"), ("token", "i4"), ("logprob", "f4")]
    + [(name, "i4") for name in ("rank", "is_stopped", "is_bad")]
)


def bytes_at(address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
    """A writable view of raw memory."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))


def hash_token(vocab_size: int) -> NextToken:
    """A model whose next token depends on every token before it."""

    def next_token(tokens: Sequence[int]) -> int:
        value = 17
        for token in tokens:
            value = (value * 1_000_003 + token + 1) % 2_147_483_647
        return value % vocab_size

    return next_token


class Packet:
    """A parsed packet; arrays are copies, as a device's copy would be."""

    def __init__(self, address: int, num_bytes: int) -> None:
        raw = bytes_at(address, num_bytes).copy()
        self.header = raw[: HEADER.itemsize].view(HEADER)[0]
        assert self.header["num_bytes"] == num_bytes
        self.inits = self._section(raw, "inits", "num_inits", ROW_INIT)
        self.words = self._section(raw, "words", "num_words", np.dtype("i4"))
        self.grants = self._section(raw, "grants", "num_grants", BLOCK_GRANT)
        self.rows = self._section(raw, "rows", "num_rows", STEP_ROW)
        self.tokens = self._section(raw, "tokens", "num_prompt_tokens", np.dtype("i4"))
        self.snapshots = self._section(raw, "snapshots", "num_snapshots", STATE_SNAPSHOT)
        self.copies = self._section(raw, "copies", "num_copies", STATE_COPY)
        self.rewinds = self._section(raw, "rewinds", "num_rewinds", ROW_REWIND)
        self.mask_rows = self._section(raw, "mask_rows", "num_masks", np.dtype("i4"))
        self.scores = self._section(raw, "scores", "num_scored", SCORED_TOKEN)

    def _section(self, raw: npt.NDArray[np.uint8], name: str, count: str, dtype: np.dtype) -> np.ndarray:
        begin = int(self.header[name])
        assert begin % 16 == 0
        return raw[begin : begin + int(self.header[count]) * dtype.itemsize].view(dtype)


class FakeDevice:
    """Executes launched plans in order, when told to.

    Args:
        config: the ledger's.
        next_token: the model; called with all tokens of a sequence. Default: `hash_token`.
    """

    def __init__(self, config: _core.LedgerConfig, next_token: NextToken | None = None) -> None:
        self.config = config
        self.next_token = next_token or hash_token(config.vocab_size)
        self.bad_rows: set[int] = set()  # rows whose logits are NaN
        self.packets: list[Packet | None] = []  # of every executed step
        self._pending: deque[_core.Plan] = deque()
        num_rows = config.max_rows + 1
        self.last_token = np.zeros(num_rows, np.int32)
        self.num_computed = np.zeros(num_rows, np.int32)
        self.slot = np.zeros(num_rows, np.int32)
        self.stopped = np.zeros(num_rows, np.int32)
        self.block_table = np.zeros((num_rows, config.max_blocks_per_row), np.int32)
        self.sampling = np.zeros(num_rows, SAMPLING)
        self.stop_ids: list[list[int]] = [[] for _ in range(num_rows)]
        self.live = np.zeros(0, STEP_ROW)
        self.blocks = np.full((config.num_blocks + 1, config.block_size), -1, np.int64)
        # A state is the tokens that made it.
        self.states: list[tuple[int, ...]] = [()] * (config.num_slots + 1)
        self.history = np.zeros((num_rows, config.max_model_len), np.int64)

    def launch(self, plan: _core.Plan) -> None:
        self._pending.append(plan)

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def run_one(self) -> None:
        """Executes the oldest launched step and publishes its results."""
        plan = self._pending.popleft()
        packet = Packet(plan.packet_address, plan.packet_bytes) if plan.packet_address else None
        self.packets.append(packet)
        if packet is not None:
            self._apply(packet, plan)
        rows = self.live
        assert len(rows) == plan.num_rows
        results = np.zeros(plan.num_sampled, RESULT_ROW)
        num_tokens = 0
        for i, step_row in enumerate(rows):
            is_decode = i < plan.num_decode_rows
            num_tokens += 1 if is_decode else int(step_row["num_tokens"])
            self._compute(i, step_row, None if is_decode else packet)
            if i < plan.num_sampled:
                results[i] = self._sample(int(step_row["row"]))
        assert num_tokens == plan.num_tokens
        self._publish(plan, results)

    def _apply(self, packet: Packet, plan: _core.Plan) -> None:
        assert packet.header["step"] == plan.step
        for init in packet.inits:
            row, sampling = int(init["row"]), init["sampling"]
            self.num_computed[row] = self.stopped[row] = 0
            self.slot[row], self.sampling[row] = init["slot"], sampling
            begin = int(init["words_begin"])
            self.stop_ids[row] = packet.words[begin : begin + int(sampling["num_stop_ids"])].tolist()
            self.block_table[row] = -1
        for grant in packet.grants:
            self.block_table[grant["row"], grant["index"]] = grant["block"]
        for rewind in packet.rewinds:
            row = int(rewind["row"])
            self.num_computed[row], self.last_token[row] = rewind["num_computed"], rewind["last_token"]
            self.stopped[row] = 0
        for copy in packet.copies:
            state = self.states[copy["src_slot"]]
            # Of a row that the device has stopped before, the copy is too short for anybody to go on from.
            assert len(state) >= copy["position"] or copy["src_slot"] != copy["dst_slot"]
            self.states[copy["dst_slot"]] = state[: copy["position"]]
        assert plan.num_copies == len(packet.copies)
        assert plan.num_snapshots == len(packet.snapshots)
        self.live = packet.rows

    def _compute(self, row_index: int, step_row: np.void, packet: Packet | None) -> None:
        row = int(step_row["row"])
        if self.stopped[row]:
            return
        snapshots: dict[int, int] = {}
        if packet is None:
            tokens = [int(self.last_token[row])]
            assert self.num_computed[row] > 0
        else:
            begin = int(step_row["prompt_begin"])
            tokens = packet.tokens[begin : begin + int(step_row["num_tokens"])].tolist()
            start, num_history = int(step_row["start"]), int(step_row["num_history"])
            self.num_computed[row] = start
            self.history[row, start - num_history : start] = packet.tokens[begin - num_history : begin]
            if start:
                self._restore(row, int(step_row["read_slot"]), start)
            mine = packet.snapshots[packet.snapshots["row_index"] == row_index]
            snapshots = dict(zip(mine["position"].tolist(), mine["slot"].tolist(), strict=True))
            assert all(start < position <= start + len(tokens) for position in snapshots)
        for token in tokens:
            self._write(row, int(self.num_computed[row]), token)
            self.num_computed[row] += 1
            if snapshots.get(int(self.num_computed[row])):
                self.states[snapshots[int(self.num_computed[row])]] = self.states[self.slot[row]]

    def _restore(self, row: int, read_slot: int, start: int) -> None:
        """The row goes on from what is cached: its slot takes over the state that read_slot holds."""
        if self.config.num_slots:
            assert len(self.states[read_slot]) == start, "a state has seen other positions than the step says"
            self.states[self.slot[row]] = self.states[read_slot]

    def _write(self, row: int, position: int, token: int) -> None:
        self.history[row, position] = token
        if self.config.num_blocks:
            block = self.block_table[row, position // self.config.block_size]
            assert block > 0
            self.blocks[block, position % self.config.block_size] = token
        if self.config.num_slots:
            slot = self.slot[row]
            assert slot > 0
            self.states[slot] = (*(self.states[slot] if position else ()), token)

    def _read(self, row: int) -> list[int]:
        """The sequence as the caches know it; where both kinds exist they must agree."""
        num_tokens = int(self.num_computed[row])
        if self.config.num_slots:
            tokens = list(self.states[self.slot[row]])
        if self.config.num_blocks:
            table = self.block_table[row, : -(-num_tokens // self.config.block_size)]
            cells: list[int] = self.blocks[table].reshape(-1)[:num_tokens].tolist()
            assert not self.config.num_slots or cells == tokens
            tokens = cells
        return tokens

    def _sample(self, row: int) -> tuple[int, int, float, int, int, int]:
        if self.stopped[row]:
            return (DUMMY_ROW, 0, 0.0, 1, 1, 0)
        if row in self.bad_rows:
            self.stopped[row] = 1
            return (row, 0, 0.0, 1, 1, 1)
        kv_len, sampling = int(self.num_computed[row]), self.sampling[row]
        token = self.next_token(self._read(row))
        is_stop = token in self.stop_ids[row] and kv_len >= sampling["min_total_len"]
        is_stopped = int(is_stop or kv_len + 1 >= sampling["max_total_len"])
        self.last_token[row], self.stopped[row] = token, is_stopped
        return (row, token, -0.5, 1, is_stopped, 0)

    def _publish(self, plan: _core.Plan, results: np.ndarray) -> None:
        config = self.config
        entry = bytes_at(plan.result_address, config.result_entry_bytes)
        rows_end = RESULT_HEADER.itemsize + config.max_results * RESULT_ROW.itemsize
        entry[RESULT_HEADER.itemsize : rows_end].view(RESULT_ROW)[: len(results)] = results
        num_cells = config.max_results * config.max_logprobs
        top_ids = entry[rows_end : rows_end + 4 * num_cells].view(np.int32)
        top_ids[:] = np.arange(num_cells)
        top_logprobs = entry[rows_end + 4 * num_cells : rows_end + 8 * num_cells].view(np.float32)
        top_logprobs[:] = -np.arange(num_cells)
        header = entry[: RESULT_HEADER.itemsize].view(RESULT_HEADER)
        header["begin_ns"], header["end_ns"] = plan.step * 10, plan.step * 10 + 5
        header["num_sampled"] = len(results)
        header["step"] = plan.step


def run_until_idle(
    ledger: _core.Ledger, device: FakeDevice, *, max_steps: int = 10_000
) -> dict[int, list[int]]:
    """Plans as far ahead as the ledger lets, executes and commits until nothing is left; tokens by request."""
    outputs: dict[int, list[int]] = {}
    for _ in range(max_steps):
        while (plan := ledger.plan()) is not None:
            device.launch(plan)
        if not device.num_pending:
            return outputs
        device.run_one()
        commit = ledger.commit()
        assert commit is not None
        ledger.check_integrity()
        for request_id, token in zip(commit.request_ids.tolist(), commit.tokens.tolist(), strict=True):
            outputs.setdefault(request_id, []).append(token)
    raise AssertionError("the ledger does not come to rest")
