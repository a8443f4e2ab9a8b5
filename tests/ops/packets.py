"""Packets and steps built by hand, as the ledger would."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headway import ops
from headway.ops.layout import (
    BLOCK_GRANT,
    PACKET_HEADER,
    RESULT_HEADER,
    RESULT_ROW,
    ROW_INIT,
    ROW_REWIND,
    ROW_SAMPLING,
    SCORED_TOKEN,
    STATE_COPY,
    STATE_SNAPSHOT,
    STEP_ROW,
)

NEUTRAL = {"top_p": 1.0, "repetition_penalty": 1.0, "max_total_len": 1 << 30, "num_logprobs": -1}


@dataclass
class Init:
    """One row's admission."""

    row: int
    slot: int
    sampling: dict[str, float] = field(default_factory=dict)
    stop_ids: list[int] = field(default_factory=list)
    bias: dict[int, float] = field(default_factory=dict)
    bad_words: list[list[int]] = field(default_factory=list)

    @property
    def bad_word_entries(self) -> list[int]:
        """Where each ends, then the tokens of all."""
        ends = itertools.accumulate(map(len, self.bad_words))
        return [*ends, *itertools.chain.from_iterable(self.bad_words)]


@dataclass
class Restore:
    """Where a chunk's state comes from, and the tokens before it that its row has not seen."""

    read_slot: int
    history: list[int] = field(default_factory=list)


@dataclass
class Packet:
    """What the host says in one step; rows are (row, start, prompt tokens), None for a decode row.

    `restores` is by row; snapshots are (row index, position, slot), copies (from slot, to slot, position), rewinds
    (row, tokens computed, next input), masks by row, scores (token index, row, next token).
    """

    step: int
    rows: list[tuple[int, int, list[int] | None]]
    num_sampled: int
    inits: list[Init] = field(default_factory=list)
    grants: list[tuple[int, int, int]] = field(default_factory=list)
    restores: dict[int, Restore] = field(default_factory=dict)
    snapshots: list[tuple[int, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    rewinds: list[tuple[int, int, int]] = field(default_factory=list)
    masks: dict[int, list[int]] = field(default_factory=dict)
    scores: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def num_decode_rows(self) -> int:
        return sum(tokens is None for _, _, tokens in self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(1 if tokens is None else len(tokens) for _, _, tokens in self.rows)

    def counts(self) -> dict[str, int]:
        return {
            "num_rows": len(self.rows),
            "num_decode_rows": self.num_decode_rows,
            "num_sampled": self.num_sampled,
            "num_tokens": self.num_tokens,
        }

    def pack(self) -> npt.NDArray[np.uint8]:
        words: list[int] = []
        inits = np.zeros(len(self.inits), ROW_INIT)
        for record, init in zip(inits, self.inits, strict=True):
            record["row"], record["slot"], record["words_begin"] = init.row, init.slot, len(words)
            record["sampling"] = sampling_record(init)
            values = np.array(list(init.bias.values()), np.float32).view(np.int32)
            words += [*init.stop_ids, *init.bias.keys(), *values.tolist(), *init.bad_word_entries]
        rows, tokens = self._pack_rows()
        return self._join(
            {
                "inits": inits,
                "words": np.array(words, np.int32),
                "grants": np.array(self.grants, BLOCK_GRANT),
                "rows": rows,
                "tokens": np.array(tokens, np.int32),
                "snapshots": np.array([(*entry, 0) for entry in self.snapshots], STATE_SNAPSHOT),
                "copies": np.array([(*entry, 0) for entry in self.copies], STATE_COPY),
                "rewinds": np.array([(*entry, 0) for entry in self.rewinds], ROW_REWIND),
                "mask_rows": np.array(list(self.masks), np.int32),
                "mask_bits": np.array(list(self.masks.values()), np.uint32),
                "scores": np.array([(*entry, 0) for entry in self.scores], SCORED_TOKEN),
            }
        )

    def _pack_rows(self) -> tuple[npt.NDArray[Any], list[int]]:
        rows = np.zeros(len(self.rows), STEP_ROW)
        tokens: list[int] = []
        for record, (row, start, prompt) in zip(rows, self.rows, strict=True):
            restore = self.restores.get(row, Restore(0))
            tokens += restore.history
            record["row"], record["start"] = row, start
            record["num_tokens"] = 1 if prompt is None else len(prompt)
            record["prompt_begin"] = -1 if prompt is None else len(tokens)
            record["read_slot"], record["num_history"] = restore.read_slot, len(restore.history)
            tokens += prompt or []
        return rows, tokens

    def _join(self, sections: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
        header = np.zeros(1, PACKET_HEADER)
        body = bytearray(PACKET_HEADER.itemsize)
        for name, section in sections.items():
            header[f"{name}_offset"] = len(body)
            body += section.tobytes()
            body += bytes(-len(body) % 16)
            if name not in ("rows", "mask_bits"):
                header[_COUNTS.get(name, f"num_{name}")] = len(section)
        header["step"], header["num_bytes"] = self.step, len(body)
        for name, count in self.counts().items():
            header[name] = count
        return np.frombuffer(header.tobytes() + bytes(body[PACKET_HEADER.itemsize :]), np.uint8)


_COUNTS = {"tokens": "num_prompt_tokens", "mask_rows": "num_masks", "scores": "num_scored"}


def sampling_record(init: Init) -> npt.NDArray[Any]:
    record = np.zeros((), ROW_SAMPLING)
    for name, value in {**NEUTRAL, **init.sampling}.items():
        record[name] = value
    record["num_stop_ids"], record["num_logit_bias"] = len(init.stop_ids), len(init.bias)
    record["num_bad_words"], record["num_bad_word_tokens"] = (
        len(init.bad_words),
        sum(map(len, init.bad_words)),
    )
    return record


def allocate(device: str, **changes: Any) -> ops.StepBuffers:
    sizes = {
        "max_rows": 9,
        "max_blocks_per_row": 4,
        "max_model_len": 64,
        "max_step_tokens": 80,
        "max_logprobs": 5,
        "max_snapshots": 12,
        "vocab_size": 1 << 13,
        "max_scored_tokens": 6,
        "num_slots": 64,
    }
    return ops.StepBuffers.allocate(**{**sizes, **changes}, device=device)


def begin(begin_step: Any, buffers: ops.StepBuffers, packet: Packet) -> None:
    """Runs begin_step with the packet in memory that its device can read."""
    device = buffers.mirror.slot.device
    memory = torch.from_numpy(packet.pack().copy())
    memory = memory.to(device) if device.type == "cuda" else memory
    begin_step(buffers, packet_address=memory.data_ptr(), **packet.counts())
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass
class Entry:
    """A ring entry in memory that every device writes."""

    max_rows: int
    max_logprobs: int

    def __post_init__(self) -> None:
        num_bytes = RESULT_HEADER.itemsize + self.max_rows * (RESULT_ROW.itemsize + 8 * self.max_logprobs)
        self.memory = torch.full((num_bytes,), 0xA5, dtype=torch.uint8)
        if torch.cuda.is_available():
            self.memory = self.memory.pin_memory()

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    @property
    def header(self) -> Any:
        return self.memory.numpy()[: RESULT_HEADER.itemsize].view(RESULT_HEADER)[0]

    def sections(self, num_sampled: int) -> dict[str, npt.NDArray[Any]]:
        body = self.memory.numpy()[RESULT_HEADER.itemsize :]
        rows, tops = self.max_rows * RESULT_ROW.itemsize, 4 * self.max_rows * self.max_logprobs
        ids = body[rows : rows + tops].view(np.int32).reshape(self.max_rows, -1)
        logprobs = body[rows + tops :].view(np.float32).reshape(self.max_rows, -1)
        return {
            "rows": body[:rows].view(RESULT_ROW)[:num_sampled],
            "top_ids": ids[:num_sampled],
            "top_logprobs": logprobs[:num_sampled],
        }


def copy_to(buffers: ops.StepBuffers, device: str) -> ops.StepBuffers:
    """The same content on another device, sharing nothing."""

    def copied(record: Any) -> Any:
        tensors = {f.name: getattr(record, f.name).to(device, copy=True) for f in dataclasses.fields(record)}
        return type(record)(**tensors)

    parts = (copied(record) for record in (buffers.mirror, buffers.inputs, buffers.results))
    return ops.StepBuffers(*parts, buffers.state_window)


def result_rows(buffers: ops.StepBuffers, num_sampled: int) -> Any:
    """The sampler's ResultRow records."""
    return buffers.results.rows.cpu().numpy().view(RESULT_ROW)[:num_sampled, 0]
