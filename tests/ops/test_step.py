"""begin_step and finish_step against the reference, over packets built by hand."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from headway import ops
from headway.ops import reference
from headway.ops.layout import RESULT_ROW, STEP_COUNTER
from tests.compare import assert_bit_equal
from tests.ops.packets import Entry, Init, Packet, Restore, allocate, begin, copy_to

RING_ROWS, RING_RESULTS = 8, 14


def assert_same(actual: ops.StepBuffers, expected: ops.StepBuffers, counts: dict[str, int]) -> None:
    """Mirrors are equal in full, inputs in the part that the step uses. Snapshots are in `counts`."""
    for field in dataclasses.fields(expected.mirror):
        got, want = getattr(actual.mirror, field.name).cpu(), getattr(expected.mirror, field.name)
        if field.name == "counter":
            for name in ("step", "num_live", "num_sampled"):
                assert got.numpy().view(STEP_COUNTER)[name] == want.numpy().view(STEP_COUNTER)[name], name
        elif field.name != "live":  # how a replayed live row is remembered is the kernel's own business
            assert_bit_equal(got, want, f"mirror.{field.name}")
    used = {"token_ids": "num_tokens", "positions": "num_tokens", "token_rows": "num_tokens"}
    used |= {"sample_tokens": "num_sampled"}
    used |= dict.fromkeys(("score_tokens", "score_rows", "score_targets"), "num_scored")
    used |= {"snapshot_positions": "num_kept_snapshots", "snapshot_slots": "num_kept_snapshots"}
    counts = {"num_snapshots": 0, "num_scored": 0, **counts}
    num_starts = counts["num_rows"] + 1 if counts["num_snapshots"] else 0
    counts["num_kept_snapshots"] = int(expected.inputs.snapshot_starts[num_starts - 1]) if num_starts else 0
    for field in dataclasses.fields(expected.inputs):
        count = counts[used.get(field.name, "num_rows")] + (field.name == "query_start")
        if field.name == "snapshot_starts":
            count = num_starts
        got, want = getattr(actual.inputs, field.name), getattr(expected.inputs, field.name)
        assert_bit_equal(got[:count], want[:count], f"inputs.{field.name}")


def admission() -> Packet:
    """Two prompts, one of them with every list filled."""
    inits = [
        Init(
            3,
            5,
            {"seed": 2**63 + 7, "temperature": 0.5, "prompt_len": 4},
            [9, 8],
            {11: -1.5, 4: 2.0},
            [[7], [5, 6, 7]],
        ),
        Init(1, 2),
    ]
    rows = [(3, 0, [10, 11, 12, 13]), (1, 0, [20, 21, 22])]
    return Packet(7, rows, num_sampled=1, inits=inits, grants=[(3, 0, 6), (1, 0, 2), (1, 1, 4)])


def test_a_packet_admits_rows(device):
    expected, actual = allocate("cpu"), allocate(device)
    begin(reference.begin_step_ref, expected, admission())
    begin(ops.begin_step, actual, admission())
    assert_same(actual, expected, admission().counts())
    assert expected.inputs.token_ids[:7].tolist() == [10, 11, 12, 13, 20, 21, 22]
    assert expected.inputs.sample_tokens[0] == 3
    assert expected.mirror.block_table[1, :2].tolist() == [2, 4]
    assert expected.mirror.bias_values[3, :2].tolist() == [-1.5, 2.0]


def decoding(device: str) -> ops.StepBuffers:
    """Buffers after one decode step of rows 2, 5 and 1, of which 5 has stopped since."""
    buffers = allocate("cpu")
    inits = [Init(row, row + 1) for row in (2, 5, 1)]
    packet = Packet(1, [(2, 9, None), (5, 4, None), (1, 30, None)], num_sampled=3, inits=inits)
    begin(reference.begin_step_ref, buffers, packet)
    for row, computed in ((2, 9), (5, 4), (1, 30)):
        buffers.mirror.num_computed[row] = computed
        buffers.mirror.last_token[row] = 100 + row
        buffers.mirror.state_base[row + 1] = computed - 3
    buffers.mirror.stopped[5] = 1
    return copy_to(buffers, device)


def test_without_a_packet_every_row_decodes(device):
    counts = {"num_rows": 3, "num_decode_rows": 3, "num_sampled": 3, "num_tokens": 3}
    expected, actual = decoding("cpu"), decoding(device)
    reference.begin_step_ref(expected, packet_address=0, **counts)
    ops.begin_step(actual, packet_address=0, **counts)
    assert_same(actual, expected, counts)
    assert expected.inputs.rows[:3].tolist() == [2, 0, 1]
    assert expected.inputs.positions[:3].tolist() == [9, 0, 30]
    assert expected.inputs.kv_lens[:3].tolist() == [10, 1, 31]
    assert expected.inputs.token_ids[:3].tolist() == [102, 0, 101]
    assert expected.mirror.history[2, 9] == 102


def test_a_chunk_of_a_stopped_row_becomes_padding(device):
    """Its tokens stay counted, and all are the dummy's."""
    packet = Packet(2, [(2, 9, None), (5, 4, [50, 51, 52]), (1, 30, [60])], num_sampled=3)
    expected, actual = decoding("cpu"), decoding(device)
    begin(reference.begin_step_ref, expected, packet)
    begin(ops.begin_step, actual, packet)
    assert_same(actual, expected, packet.counts())
    assert expected.inputs.query_start[:4].tolist() == [0, 1, 4, 5]
    assert expected.inputs.positions[1:4].tolist() == [0, 0, 0]


def assert_same_after(packet: Packet, device: str) -> ops.StepBuffers:
    """Begins the step on buffers that `decoding` left, on the device and by the reference; returns the latter's."""
    expected, actual = decoding("cpu"), decoding(device)
    for buffers in (expected, actual):
        buffers.inputs.snapshot_starts.fill_(-7)
    begin(reference.begin_step_ref, expected, packet)
    begin(ops.begin_step, actual, packet)
    assert_same(actual, expected, all_counts(packet))
    return expected


def all_counts(packet: Packet) -> dict[str, int]:
    return packet.counts() | {"num_snapshots": len(packet.snapshots), "num_scored": len(packet.scores)}


def test_a_chunk_continues_from_the_slot_it_names_and_only_that_step(device):
    """And brings the tokens before it that the row's history lacks."""
    restores = {3: Restore(8, [40, 41, 42, 43, 44])}
    rows = [(2, 9, None), (3, 5, [45, 46])]
    packet = Packet(2, rows, num_sampled=2, inits=[Init(3, 4)], restores=restores)
    expected = assert_same_after(packet, device)
    assert expected.inputs.read_slots[:2].tolist() == [3, 8]
    assert expected.inputs.write_slots[:2].tolist() == [3, 4]
    assert expected.inputs.state_base[:2].tolist() == [6, 5]
    assert expected.mirror.history[3, :8].tolist() == [40, 41, 42, 43, 44, 45, 46, 0]
    assert expected.inputs.token_ids[:3].tolist() == [102, 45, 46]
    actual = copy_to(expected, device)
    counts = {"num_rows": 2, "num_decode_rows": 2, "num_sampled": 2, "num_tokens": 2}
    for buffers in (expected, actual):
        buffers.mirror.num_computed[3] = 7
    reference.begin_step_ref(expected, packet_address=0, **counts)
    ops.begin_step(actual, packet_address=0, **counts)
    assert_same(actual, expected, counts)
    assert expected.inputs.read_slots[:2].tolist() == [3, 4]


def test_snapshots_become_lists_by_row_without_those_of_stopped_rows(device):
    rows = [(2, 9, None), (5, 4, [50, 51, 52]), (1, 30, [60, 61]), (4, 0, [70]), (6, 8, [80, 81, 82])]
    snapshots = [(1, 5, 11), (1, 7, 12), (2, 31, 13), (2, 32, 14), (4, 9, 15), (4, 10, 16), (4, 11, 17)]
    inits = [Init(4, 5), Init(6, 7)]
    packet = Packet(2, rows, num_sampled=3, inits=inits, snapshots=snapshots)
    expected = assert_same_after(packet, device)
    assert expected.inputs.snapshot_starts[:6].tolist() == [0, 0, 0, 2, 2, 5]
    assert expected.inputs.snapshot_positions[:5].tolist() == [31, 32, 9, 10, 11]
    assert expected.inputs.snapshot_slots[:5].tolist() == [13, 14, 15, 16, 17]


def test_a_rewind_sets_what_the_next_step_begins_with(device):
    """Also for a row that had stopped, and after the reset of one that is admitted at once."""
    rows = [(2, 9, None), (5, 4, None), (7, 3, None)]
    rewinds = [(2, 6, 66), (5, 3, 55), (7, 2, 77)]
    packet = Packet(2, rows, num_sampled=3, inits=[Init(7, 8)], rewinds=rewinds)
    expected = assert_same_after(packet, device)
    assert expected.inputs.rows[:3].tolist() == [2, 5, 7]
    assert expected.inputs.positions[:3].tolist() == [6, 3, 2]
    assert expected.inputs.token_ids[:3].tolist() == [66, 55, 77]
    assert expected.mirror.stopped.tolist() == [0] * 9


def test_a_copied_state_has_seen_every_token(device):
    packet = Packet(2, [(2, 9, None)], num_sampled=1, copies=[(3, 7, 9), (5, 5, 4)])
    expected = assert_same_after(packet, device)
    assert expected.mirror.state_base[[3, 5, 7]].tolist() == [6, 4, 9]


def fill_results(buffers: ops.StepBuffers, rng: random.Random) -> None:
    rows = buffers.results.rows.numpy().view(RESULT_ROW)[:, 0]
    for index, record in enumerate(rows):
        row = int(buffers.inputs.rows[index]) if index < len(buffers.inputs.rows) else 0
        record["row"], record["token"] = row, rng.randrange(50)
        record["logprob"], record["rank"] = -rng.random(), rng.randrange(1, 9)
        record["is_stopped"] = rng.random() < 0.3
    buffers.results.top_ids.copy_(torch.randint(-1, 50, buffers.results.top_ids.shape))
    buffers.results.top_logprobs.copy_(-torch.rand(buffers.results.top_logprobs.shape))


def random_packet(rng: random.Random, step: int, known: dict[int, int]) -> Packet:
    """Admits, continues and decodes; known maps a row to the tokens the host believes it has."""
    inits, chunks, grants = [], [], []
    decodes = [(row, length, None) for row, length in known.items() if rng.random() < 0.8]
    for row in rng.sample(range(1, 9), 8):
        if row in known or rng.random() < 0.5 or len(decodes) + len(chunks) >= RING_ROWS:
            continue
        stops = [rng.randrange(50) for _ in range(rng.randrange(4))]
        words = [[rng.randrange(50) for _ in range(rng.randrange(1, 4))] for _ in range(rng.randrange(3))]
        sampling = {"seed": rng.getrandbits(64)}
        inits.append(Init(row, 30 + row, sampling, stops, {3: rng.random()}, words))
        start = rng.choice([0, 0, 0, rng.randrange(1, 9)])
        chunks.append((row, start, [rng.randrange(50) for _ in range(rng.randrange(1, 9))]))
        grants.append((row, rng.randrange(4), rng.randrange(1, 30)))
    num_final = rng.randrange(len(chunks) + 1)
    for row, start, tokens in [*decodes, *chunks]:
        known[row] = start + (1 if tokens is None else len(tokens))
    packet = Packet(step, [*decodes, *chunks], len(decodes) + num_final, inits, grants)
    add_news_of_states(rng, packet)
    return packet


def add_news_of_states(rng: random.Random, packet: Packet) -> None:
    """Slots to continue from, history, snapshots, copies, rewinds, masks and scores, in no sensible relation."""
    slots = rng.sample(range(1, 30), 29)  # none is written twice, or read by a copy and written by another
    for index, (row, start, tokens) in enumerate(packet.rows):
        if tokens is None:
            if rng.random() < 0.1:
                packet.rewinds.append((row, start - rng.randrange(2), rng.randrange(50)))
            continue
        history = [rng.randrange(50) for _ in range(rng.randrange(start + 1))]
        packet.restores[row] = Restore(rng.randrange(1, 30), history)
        positions = rng.sample(
            range(start + 1, start + len(tokens) + 1), rng.randrange(min(len(tokens), 2) + 1)
        )
        packet.snapshots += [(index, position, slots.pop()) for position in sorted(positions)]
    del packet.snapshots[12:]
    for source, target in list(zip(slots[::2], slots[1::2], strict=False))[: rng.randrange(4)]:
        packet.copies.append((source, rng.choice([source, target]), rng.randrange(60)))
    for row in rng.sample(range(1, 9), rng.randrange(3)):
        packet.masks[row] = [rng.getrandbits(32) for _ in range(256)]
    for _ in range(rng.randrange(6)):
        packet.scores.append((rng.randrange(40), rng.randrange(1, 9), rng.randrange(50)))


@pytest.mark.parametrize("seed", range(8))
def test_traces_of_steps(seed, device):
    """Forty steps of packets and of silence: mirror, inputs and ring entries stay equal to the reference's."""
    rng = random.Random(seed)
    window = ops.StateWindow(16, seed) if seed % 2 else ops.StateWindow()
    expected, actual = allocate("cpu", state_window=window), allocate(device, state_window=window)
    known: dict[int, int] = {}
    packet = Packet(0, [], 0)
    for step in range(1, 41):
        is_silent = packet.num_decode_rows == len(packet.rows) > 0 and rng.random() < 0.5
        if is_silent:
            reference.begin_step_ref(expected, packet_address=0, **packet.counts())
            ops.begin_step(actual, packet_address=0, **packet.counts())
        else:
            for row in [r for r in known if rng.random() < 0.2 or known[r] > 50]:
                del known[row]
            packet = random_packet(rng, step, known)
            begin(reference.begin_step_ref, expected, packet)
            begin(ops.begin_step, actual, packet)
        assert_same(actual, expected, packet.counts() if is_silent else all_counts(packet))
        fill_results(expected, rng)
        for name in ("rows", "top_ids", "top_logprobs"):
            getattr(actual.results, name).copy_(getattr(expected.results, name))
        finish_both(expected, actual, step, packet)


def finish_both(expected: ops.StepBuffers, actual: ops.StepBuffers, step: int, packet: Packet) -> None:
    entries = []
    for finish_step, buffers in ((reference.finish_step_ref, expected), (ops.finish_step, actual)):
        entry = Entry(RING_RESULTS, buffers.max_logprobs)
        finish_step(
            buffers,
            step=step,
            num_rows=len(packet.rows),
            num_decode_rows=packet.num_decode_rows,
            num_sampled=packet.num_sampled,
            num_scored=len(packet.scores),
            result_address=entry.address,
            ring_max_results=RING_RESULTS,
        )
        entries.append(entry)
    if actual.mirror.slot.is_cuda:
        torch.cuda.synchronize()
    assert_same(actual, expected, packet.counts())
    want, got = entries
    assert got.header["step"] == want.header["step"] == step
    assert got.header["num_sampled"] == packet.num_sampled
    assert got.header["num_scored"] == len(packet.scores)
    for name, section in want.sections(packet.num_sampled).items():
        np.testing.assert_array_equal(got.sections(packet.num_sampled)[name], section, err_msg=name)


def test_counts_beyond_the_buffers_are_refused(device):
    buffers = allocate(device)
    counts = {"packet_address": 0, "num_decode_rows": 1, "num_sampled": 1}
    with pytest.raises(ValueError, match="num_tokens must be at most 80, got 81"):
        ops.begin_step(buffers, num_rows=1, num_tokens=81, **counts)
    with pytest.raises(ValueError, match="num_rows 9"):
        ops.begin_step(buffers, num_rows=9, num_tokens=9, **counts)
    with pytest.raises(ValueError, match="at most 2 together, got 3 and 0"):
        ops.finish_step(
            buffers,
            step=1,
            num_rows=3,
            num_decode_rows=3,
            num_sampled=3,
            result_address=0,
            ring_max_results=2,
        )
