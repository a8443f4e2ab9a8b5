"""begin_step and finish_step in numpy over CPU buffers: the records of csrc/core/step_layout.h, one row at a time."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

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
    STEP_COUNTER,
    STEP_ROW,
)
from headway.ops.step import StepBuffers

Records = npt.NDArray[Any]


class _Packet(NamedTuple):
    step: int
    inits: Records
    words: npt.NDArray[np.int32]
    grants: Records
    rows: Records
    prompt_tokens: npt.NDArray[np.int32]
    snapshots: Records
    rewinds: Records
    mask_rows: npt.NDArray[np.int32]
    mask_bits: npt.NDArray[np.int32]  # [num_masks, mask_words]
    scores: Records
    copies: Records


def begin_step_ref(
    buffers: StepBuffers,
    *,
    packet_address: int,
    num_rows: int,
    num_decode_rows: int,
    num_sampled: int,
    num_tokens: int,
) -> None:
    """See `ops.begin_step`."""
    live = buffers.mirror.live.numpy().view(STEP_ROW)[:, 0]
    counter = buffers.mirror.counter.numpy().view(STEP_COUNTER)
    prompt_tokens, snapshots = np.zeros(0, np.int32), np.zeros(0, STATE_SNAPSHOT)
    counter["step"] += 1
    if packet_address:
        packet = _read_packet(packet_address, buffers.mirror.token_masks.shape[1])
        counter["step"] = packet.step
        _apply(buffers, packet)
        live[: len(packet.rows)] = packet.rows
        prompt_tokens, snapshots = packet.prompt_tokens, packet.snapshots
    else:
        num_decode_rows = num_rows
    counter["num_live"] = num_rows
    counter["num_sampled"] = num_sampled
    inputs = buffers.inputs
    query_start = inputs.query_start.numpy()
    query_start[0] = 0
    for index in range(num_rows):
        is_decode = index < num_decode_rows
        count = 1 if is_decode else int(live[index]["num_tokens"])
        begin = int(query_start[index])
        query_start[index + 1] = begin + count
        inputs.token_rows[begin : begin + count] = index
        row = int(live[index]["row"])
        if row == 0 or buffers.mirror.stopped[row]:
            _fill_dummy(buffers, index, begin, count)
            continue
        if is_decode:
            start = int(buffers.mirror.num_computed[row])
            tokens = buffers.mirror.last_token.numpy()[row : row + 1]
            _fill_row(buffers, index, begin, row, start, tokens)
        else:
            _fill_chunk(buffers, index, begin, live[index], prompt_tokens)
    if len(snapshots):
        _fill_snapshots(buffers, num_rows, snapshots)
    inputs.sample_tokens.numpy()[:num_sampled] = query_start[1 : num_sampled + 1] - 1


def _read_packet(address: int, mask_words: int) -> _Packet:
    header = np.frombuffer(_host_bytes(address, PACKET_HEADER.itemsize), PACKET_HEADER)[0]
    raw = _host_bytes(address, int(header["num_bytes"]))

    def section(dtype: npt.DTypeLike, count: str, offset: str) -> Records:
        return np.frombuffer(raw, dtype, int(header[count]), int(header[offset]))

    return _Packet(
        step=int(header["step"]),
        inits=section(ROW_INIT, "num_inits", "inits_offset"),
        words=section(np.int32, "num_words", "words_offset"),
        grants=section(BLOCK_GRANT, "num_grants", "grants_offset"),
        rows=section(STEP_ROW, "num_rows", "rows_offset"),
        prompt_tokens=section(np.int32, "num_prompt_tokens", "tokens_offset"),
        snapshots=section(STATE_SNAPSHOT, "num_snapshots", "snapshots_offset"),
        rewinds=section(ROW_REWIND, "num_rewinds", "rewinds_offset"),
        mask_rows=section(np.int32, "num_masks", "mask_rows_offset"),
        mask_bits=section((np.int32, mask_words), "num_masks", "mask_bits_offset"),
        scores=section(SCORED_TOKEN, "num_scored", "scores_offset"),
        copies=section(STATE_COPY, "num_copies", "copies_offset"),
    )


def _host_bytes(address: int, num_bytes: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * num_bytes).from_address(address))


def _apply(buffers: StepBuffers, packet: _Packet) -> None:
    mirror = buffers.mirror
    sampling = mirror.sampling.numpy().view(ROW_SAMPLING)[:, 0]
    for init in packet.inits:
        row = int(init["row"])
        mirror.last_token[row] = 0
        mirror.num_computed[row] = 0
        mirror.stopped[row] = 0
        mirror.slot[row] = int(init["slot"])
        sampling[row] = init["sampling"]
        num_stop = int(init["sampling"]["num_stop_ids"])
        num_bias = int(init["sampling"]["num_logit_bias"])
        words = packet.words[int(init["words_begin"]) :]
        mirror.stop_ids.numpy()[row, :num_stop] = words[:num_stop]
        mirror.bias_ids.numpy()[row, :num_bias] = words[num_stop : num_stop + num_bias]
        values = words[num_stop + num_bias : num_stop + 2 * num_bias]
        mirror.bias_values.numpy()[row, :num_bias] = values.view(np.float32)
        num_entries = int(init["sampling"]["num_bad_words"] + init["sampling"]["num_bad_word_tokens"])
        mirror.bad_words.numpy()[row, :num_entries] = words[num_stop + 2 * num_bias :][:num_entries]
    for grant in packet.grants:
        mirror.block_table[int(grant["row"]), int(grant["index"])] = int(grant["block"])
    mirror.token_masks.numpy()[packet.mask_rows] = packet.mask_bits
    for column, name in (
        (buffers.inputs.score_tokens, "token_index"),
        (buffers.inputs.score_rows, "row"),
        (buffers.inputs.score_targets, "target"),
    ):
        column.numpy()[: len(packet.scores)] = packet.scores[name]
    for rewind in packet.rewinds:
        row = int(rewind["row"])
        mirror.num_computed[row] = int(rewind["num_computed"])
        mirror.last_token[row] = int(rewind["last_token"])
        mirror.stopped[row] = 0
    for copy in packet.copies:
        mirror.state_base[int(copy["dst_slot"])] = int(copy["position"])


def _fill_row(
    buffers: StepBuffers, index: int, begin: int, row: int, start: int, tokens: npt.NDArray[np.int32]
) -> None:
    inputs, end = buffers.inputs, start + len(tokens)
    buffers.mirror.num_computed[row] = start
    buffers.mirror.history.numpy()[row, start:end] = tokens
    inputs.token_ids.numpy()[begin : begin + len(tokens)] = tokens
    inputs.positions.numpy()[begin : begin + len(tokens)] = np.arange(start, end)
    inputs.rows[index] = row
    inputs.read_slots[index] = inputs.write_slots[index] = buffers.mirror.slot[row]
    inputs.state_base[index] = buffers.mirror.state_base[buffers.mirror.slot[row]]
    inputs.row_start[index] = start
    inputs.kv_lens[index] = end


def _fill_chunk(
    buffers: StepBuffers, index: int, begin: int, chunk: np.void, prompt_tokens: npt.NDArray[np.int32]
) -> None:
    row, start, num_history = (int(chunk[name]) for name in ("row", "start", "num_history"))
    prompt_begin = int(chunk["prompt_begin"])
    history = prompt_tokens[prompt_begin - num_history : prompt_begin]
    buffers.mirror.history.numpy()[row, start - num_history : start] = history
    tokens = prompt_tokens[prompt_begin : prompt_begin + int(chunk["num_tokens"])]
    _fill_row(buffers, index, begin, row, start, tokens)
    buffers.inputs.read_slots[index] = int(chunk["read_slot"])
    buffers.inputs.state_base[index] = start


def _fill_dummy(buffers: StepBuffers, index: int, begin: int, count: int) -> None:
    inputs = buffers.inputs
    inputs.token_ids[begin : begin + count] = 0
    inputs.positions[begin : begin + count] = 0
    inputs.rows[index] = 0
    inputs.read_slots[index] = inputs.write_slots[index] = 0
    inputs.state_base[index] = 0
    inputs.row_start[index] = 0
    inputs.kv_lens[index] = 1


def _fill_snapshots(buffers: StepBuffers, num_rows: int, snapshots: Records) -> None:
    inputs, num_kept = buffers.inputs, 0
    for index in range(num_rows):
        inputs.snapshot_starts[index] = num_kept
        for snapshot in snapshots[snapshots["row_index"] == index]:
            if inputs.rows[index]:
                buffers.mirror.state_base[int(snapshot["slot"])] = int(snapshot["position"])
                inputs.snapshot_positions[num_kept] = int(snapshot["position"])
                inputs.snapshot_slots[num_kept] = int(snapshot["slot"])
                num_kept += 1
    inputs.snapshot_starts[num_rows] = num_kept


def finish_step_ref(
    buffers: StepBuffers,
    *,
    step: int,
    num_rows: int,
    num_decode_rows: int,
    num_sampled: int,
    result_address: int,
    ring_max_results: int,
    num_scored: int = 0,
) -> None:
    """See `ops.finish_step`."""
    mirror, inputs, results = buffers.mirror, buffers.inputs, buffers.results
    sampled = results.rows.numpy().view(RESULT_ROW)[:, 0]
    for index in range(num_rows):
        row = int(inputs.rows[index])
        if row == 0:
            continue
        start = int(mirror.num_computed[row])
        end = start + int(inputs.query_start[index + 1] - inputs.query_start[index])
        mirror.num_computed[row] = end
        slot, base = int(mirror.slot[row]), int(mirror.state_base[mirror.slot[row]])
        is_decode = index < num_decode_rows
        mirror.state_base[slot] = buffers.state_window.next_base(base, start, end) if is_decode else end
        if index < num_sampled:
            mirror.last_token[row] = int(sampled[index]["token"])
            mirror.stopped[row] = int(sampled[index]["is_stopped"])
    max_logprobs = buffers.max_logprobs
    num_results = num_sampled + num_scored
    tops = ring_max_results * max_logprobs
    num_bytes = RESULT_HEADER.itemsize + ring_max_results * RESULT_ROW.itemsize + 8 * tops
    entry = np.frombuffer(_host_bytes(result_address, num_bytes), np.uint8)
    header = entry[: RESULT_HEADER.itemsize].view(RESULT_HEADER)
    body = entry[RESULT_HEADER.itemsize :]
    rows_bytes = ring_max_results * RESULT_ROW.itemsize
    body[:rows_bytes].view(RESULT_ROW)[:num_results] = sampled[:num_results]
    used = num_results * max_logprobs
    top_ids = body[rows_bytes : rows_bytes + 4 * tops].view(np.int32)
    top_logprobs = body[rows_bytes + 4 * tops :].view(np.float32)
    top_ids[:used] = results.top_ids.numpy()[:num_results].ravel()
    top_logprobs[:used] = results.top_logprobs.numpy()[:num_results].ravel()
    header["num_sampled"], header["num_scored"] = num_sampled, num_scored
    header["step"] = step
