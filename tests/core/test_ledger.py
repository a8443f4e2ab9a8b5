"""The core as Python sees it: types, arrays, errors, threads. What it decides is checked in C++ (`csrc/tests/core`)."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from headway import _core, errors
from tests.core import fake_device
from tests.core.fake_device import FakeDevice, run_until_idle

GREEDY = _core.SamplingSpec()


def make_config(**changes: int) -> _core.LedgerConfig:
    sizes = {
        "max_rows": 4,
        "num_blocks": 32,
        "block_size": 4,
        "num_slots": 4,
        "max_model_len": 64,
        "max_step_tokens": 16,
        "vocab_size": 100,
        "max_logprobs": 3,
    }
    return _core.LedgerConfig(**(sizes | changes))


def prompt_of(num_tokens: int, token: int = 5) -> npt.NDArray[np.int32]:
    return np.full(num_tokens, token, np.int32)


def aligned_address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return -(-ctypes.addressof(buffer) // 64) * 64


@pytest.fixture(autouse=True)
def error_types() -> None:
    _core.set_error_types(errors.RequestError, errors.CapacityError, errors.IntegrityError)


def test_struct_sizes_match_the_layout() -> None:
    assert fake_device.HEADER.itemsize == _core.PACKET_HEADER_BYTES
    assert fake_device.SAMPLING.itemsize == _core.ROW_SAMPLING_BYTES
    assert fake_device.STEP_ROW.itemsize == _core.STEP_ROW_BYTES
    assert fake_device.STATE_SNAPSHOT.itemsize == _core.STATE_SNAPSHOT_BYTES
    assert fake_device.STATE_COPY.itemsize == _core.STATE_COPY_BYTES
    assert fake_device.ROW_REWIND.itemsize == _core.ROW_REWIND_BYTES
    assert fake_device.RESULT_HEADER.itemsize == _core.RESULT_HEADER_BYTES
    assert fake_device.RESULT_ROW.itemsize == _core.RESULT_ROW_BYTES


def test_config_derives_sizes() -> None:
    config = make_config(max_launch_depth=2)
    assert config.max_blocks_per_row == 16
    assert make_config(num_blocks=0).max_blocks_per_row == 1
    rows_bytes = config.max_rows * (_core.RESULT_ROW_BYTES + 8 * config.max_logprobs)
    assert config.result_entry_bytes == -(-(_core.RESULT_HEADER_BYTES + rows_bytes) // 64) * 64
    assert config.result_ring_bytes == 3 * config.result_entry_bytes
    assert config.packet_ring_bytes % (3 * 64) == 0


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize(("num_blocks", "num_slots"), [(64, 4), (0, 4), (64, 0), (10, 2)])
def test_outputs_do_not_depend_on_depth_or_memory(depth: int, num_blocks: int, num_slots: int) -> None:
    prompts = [prompt_of(n, n) for n in (1, 3, 9, 17, 30)]
    spec = _core.SamplingSpec(stop_ids=[7, 8], min_tokens=2)

    def serve(config: _core.LedgerConfig) -> list[list[int]]:
        ledger = _core.Ledger(config)
        ids = [ledger.add(prompt, spec, max_new_tokens=10) for prompt in prompts]
        outputs = run_until_idle(ledger, FakeDevice(config))
        assert not ledger.has_unfinished
        return [outputs[request_id] for request_id in ids]

    config = make_config(num_blocks=num_blocks, num_slots=num_slots, max_launch_depth=depth)
    assert serve(config) == serve(make_config(max_rows=1))


def test_plan_and_commit_tell_the_whole_step() -> None:
    config = make_config()
    ledger, device = _core.Ledger(config), FakeDevice(config, lambda tokens: 40 + len(tokens))
    first = ledger.add(prompt_of(3), _core.SamplingSpec(num_logprobs=2, stop_ids=[44]), max_new_tokens=9)
    second = ledger.add(prompt_of(20), GREEDY, max_new_tokens=9)
    plan = ledger.plan()
    assert plan is not None
    assert (plan.step, plan.num_rows, plan.num_decode_rows, plan.num_sampled) == (1, 2, 0, 1)
    assert (plan.num_tokens, plan.max_query_len, plan.max_kv_len) == (16, 13, 13)
    assert plan.packet_bytes > _core.PACKET_HEADER_BYTES
    assert ledger.num_in_flight == 1
    assert not ledger.is_ready()
    assert ledger.commit() is None
    device.launch(plan)
    device.run_one()
    assert ledger.is_ready()
    commit = ledger.commit()
    assert commit is not None
    assert (commit.step, commit.begin_ns, commit.end_ns) == (1, 10, 15)
    assert commit.request_ids.tolist() == [first]
    assert commit.request_ids.dtype == np.int64
    assert commit.tokens.tolist() == [43]
    assert commit.finish_reasons.tolist() == [_core.NOT_FINISHED]
    assert commit.stop_tokens.tolist() == [-1]
    assert commit.logprobs.tolist() == [-0.5]
    assert commit.ranks.tolist() == [1]
    assert commit.top_ids.tolist() == [[0, 1, -1]]
    assert commit.top_logprobs.tolist() == [[0.0, -1.0, 0.0]]
    device.launch(plan_of(ledger))
    device.run_one()
    commit = ledger.commit()
    assert commit is not None
    assert commit.request_ids.tolist() == [first, second]
    assert commit.tokens.tolist() == [44, 60]
    assert commit.finish_reasons.tolist() == [_core.FINISH_STOP, _core.NOT_FINISHED]
    assert commit.stop_tokens.tolist() == [44, -1]
    assert commit.top_ids.shape == (2, 3)
    assert ledger.output_tokens(first).tolist() == [43, 44]


def plan_of(ledger: _core.Ledger) -> _core.Plan:
    plan = ledger.plan()
    assert plan is not None
    return plan


def test_commit_arrays_outlive_everything() -> None:
    config = make_config()
    ledger, device = _core.Ledger(config), FakeDevice(config, lambda tokens: len(tokens))
    ledger.add(prompt_of(3), GREEDY, max_new_tokens=9)
    columns: list[npt.NDArray[np.int32]] = []
    for _ in range(5):
        device.launch(plan_of(ledger))
        device.run_one()
        commit = ledger.commit()
        assert commit is not None
        assert commit.top_ids.tolist() == [[-1, -1, -1]]
        columns.append(commit.tokens)
    del ledger, device, commit
    gc.collect()
    assert [column.tolist() for column in columns] == [[3], [4], [5], [6], [7]]


def test_steady_decode_brings_no_packet() -> None:
    config = make_config(grant_ahead_blocks=8, max_launch_depth=1)
    ledger, device = _core.Ledger(config), FakeDevice(config)
    for token in range(3):
        ledger.add(prompt_of(4, token), GREEDY, max_new_tokens=16)
    run_until_idle(ledger, device)
    has_packet = [packet is not None for packet in device.packets]
    assert has_packet == [True] + [False] * 15


def test_given_rings_are_used() -> None:
    config = make_config(max_launch_depth=1)
    packets = ctypes.create_string_buffer(config.packet_ring_bytes + 64)
    results = ctypes.create_string_buffer(config.result_ring_bytes + 64)
    packet_ring, result_ring = aligned_address(packets), aligned_address(results)
    ledger = _core.Ledger(config, packet_ring, result_ring)
    request_id = ledger.add(prompt_of(30), GREEDY, max_new_tokens=9)
    for _ in range(2):
        plan = plan_of(ledger)
        assert packet_ring <= plan.packet_address
        assert plan.packet_address + plan.packet_bytes <= packet_ring + config.packet_ring_bytes
        assert result_ring <= plan.result_address
        assert plan.result_address + config.result_entry_bytes <= result_ring + config.result_ring_bytes
    assert ledger.abort(request_id)
    with pytest.raises(errors.RequestError, match="packet_ring_address must be 64-byte aligned"):
        _core.Ledger(config, packet_ring + 4, result_ring)


def test_a_request_is_driven_from_python() -> None:
    config = make_config(max_launch_depth=1)
    ledger, device = _core.Ledger(config), FakeDevice(config, lambda tokens: len(tokens))
    ids = [ledger.add(prompt_of(4), GREEDY, max_new_tokens=20, priority=i) for i in range(4)]
    for _ in range(4):
        while (plan := ledger.plan()) is not None:
            device.launch(plan)
        device.run_one()
        ledger.commit()
    assert ledger.finish(ids[0], 2)
    assert ledger.output_tokens(ids[0]).tolist() == [4, 5]
    assert ledger.abort(ids[1])
    assert ledger.pause(ids[2])
    assert ledger.evict(ids[3])
    assert not ledger.pause(ids[0])
    stats = ledger.stats()
    assert (stats.num_running, stats.num_paused, stats.num_waiting, stats.num_finished) == (0, 1, 1, 2)
    assert stats.blocks_free + stats.blocks_fenced < stats.blocks_total
    assert (stats.slots_total, stats.slots_free, stats.slots_fenced) == (4, 0, 3)
    assert ledger.resume(ids[2])
    run_until_idle(ledger, device)
    stats = ledger.stats()
    assert (stats.num_finished, stats.num_evictions) == (4, 1)
    assert (stats.blocks_free, stats.slots_free) == (stats.blocks_total, stats.slots_total)
    assert stats.steps_launched == stats.steps_committed


def test_bad_logits_end_the_request_with_an_error() -> None:
    config = make_config()
    ledger, device = _core.Ledger(config), FakeDevice(config)
    request_id = ledger.add(prompt_of(4), GREEDY, max_new_tokens=20)
    device.bad_rows.add(1)
    device.launch(plan_of(ledger))
    device.run_one()
    commit = ledger.commit()
    assert commit is not None
    assert commit.tokens.tolist() == [-1]
    assert commit.finish_reasons.tolist() == [_core.FINISH_ERROR]
    assert ledger.output_tokens(request_id).tolist() == []


def test_a_device_that_disagrees_is_caught() -> None:
    config = make_config()
    ledger, device = _core.Ledger(config), FakeDevice(config, lambda tokens: 100)
    ledger.add(prompt_of(4), GREEDY, max_new_tokens=20)
    device.launch(plan_of(ledger))
    device.run_one()
    with pytest.raises(errors.IntegrityError, match="no valid token"):
        ledger.commit()


@pytest.mark.parametrize(
    ("prompt", "spec", "max_new_tokens", "parameter", "value"),
    [
        ([], {}, 1, "len(prompt)", 0),
        ([100], {}, 1, "prompt", 100),
        ([-1], {}, 1, "prompt", -1),
        ([1], {}, 0, "max_new_tokens", 0),
        ([1], {"min_tokens": 5}, 4, "min_tokens", 5),
        ([1], {"num_logprobs": 4}, 4, "num_logprobs", 4),
        ([1], {"stop_ids": [100]}, 4, "stop_ids", 100),
        ([1], {"stop_ids": [1] * 65}, 4, "len(stop_ids)", 65),
        ([1], {"logit_bias": {-1: 0.5}}, 4, "logit_bias", -1),
    ],
)
def test_bad_requests_name_parameter_value_and_limit(
    prompt: Sequence[int], spec: dict[str, object], max_new_tokens: int, parameter: str, value: int
) -> None:
    ledger = _core.Ledger(make_config())
    with pytest.raises(errors.RequestError) as raised:
        ledger.add(np.array(prompt, np.int32), _core.SamplingSpec(**spec), max_new_tokens=max_new_tokens)
    assert (raised.value.parameter, raised.value.value) == (parameter, value)
    assert raised.value.limit
    assert not ledger.has_unfinished


def test_a_request_that_can_never_fit_names_the_setting() -> None:
    ledger = _core.Ledger(make_config(num_blocks=8))
    with pytest.raises(errors.CapacityError, match="num_blocks to 9"):
        ledger.add(prompt_of(30), GREEDY, max_new_tokens=4)
    with pytest.raises(errors.CapacityError, match="raise max_model_len"):
        ledger.add(prompt_of(64), GREEDY, max_new_tokens=1)
    assert ledger.add(prompt_of(30), GREEDY, max_new_tokens=3) == 1


def test_bad_sizes_and_unknown_requests_are_refused() -> None:
    with pytest.raises(errors.RequestError, match="max_rows must be"):
        make_config(max_rows=0)
    ledger = _core.Ledger(make_config())
    assert not any(call(1) for call in (ledger.abort, ledger.pause, ledger.resume, ledger.evict))
    assert not ledger.finish(1, 0)
    with pytest.raises(errors.RequestError, match="request_id"):
        ledger.output_tokens(1)


def test_calls_from_threads_are_taken_one_at_a_time() -> None:
    config = make_config(max_rows=4, max_launch_depth=2)
    ledger, device = _core.Ledger(config), FakeDevice(config)
    num_requests = 40

    def submit() -> None:
        for i in range(num_requests // 2):
            request_id = ledger.add(prompt_of(3, i), GREEDY, max_new_tokens=4)
            if i % 5 == 0:
                ledger.abort(request_id)

    threads = [threading.Thread(target=submit) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        run_until_idle(ledger, device)
    run_until_idle(ledger, device)
    assert ledger.stats().num_finished == num_requests


def test_a_plan_says_who_got_a_row() -> None:
    ledger = _core.Ledger(make_config(max_rows=2, max_launch_depth=3))
    ids = [ledger.add(prompt_of(3), GREEDY, max_new_tokens=9) for _ in range(3)]
    plan = ledger.plan()
    assert plan is not None
    assert plan.num_admitted == 2
    assert ledger.admitted_requests() == ids[:2]
    ledger.abort(ids[0])
    assert ledger.admitted_requests() == ids[1:2]
    plan = ledger.plan()
    assert plan is not None
    assert (plan.num_admitted, ledger.admitted_requests()) == (0, [])
