"""Moves states over slot windows, with their logs folded in."""

from __future__ import annotations

import ctypes

import numpy as np
from torch import Tensor

from headway.ops.backend import target_of
from headway.ops.checks import check_index, dtype_code, state_dtype_code
from headway.ops.layout import STATE_COPY
from headway.ops.mamba_decode import check_gpu_window
from headway.ops.state_log import MixerWeights, StateLog
from headway.ops.state_replay import replay_to


def fold_states(
    weights: MixerWeights,
    conv_state: Tensor,
    ssm_state: Tensor,
    log: StateLog,
    state_base: Tensor,
    copies_address: int,
    num_copies: int,
) -> None:
    """Each copy's target gets the state that its source has after the copy's position, and an empty log; one layer.

    Args:
        weights: of the mixer.
        conv_state: [num_slots, W - 1, conv_dim]; updated.
        ssm_state: [num_slots, H, P, N] float32 or float16; updated.
        log: read.
        state_base: [num_slots] tokens that the slots' states have seen, as `begin_step` finds it.
        copies_address: of StateCopy records in memory that the device reads. No slot is the target of one copy and
            named by another; source and target of a copy may be one.
        num_copies: so many.
    """
    op = "fold_states"
    num_slots, num_heads, head_dim, state_size = ssm_state.shape
    check_index(op, "state_base", state_base, num_slots, "num_slots")
    if ssm_state.is_cpu:
        for copy in _host_records(copies_address, num_copies):
            source, target, position = (int(copy[name]) for name in ("src_slot", "dst_slot", "position"))
            base = int(state_base[source])
            replay_to(
                weights,
                conv_state,
                ssm_state,
                log,
                source=source,
                target=target,
                base=base,
                position=position,
            )
        return
    check_gpu_window(op, ssm_state, log, conv_state.shape[1] + 1)
    num_groups = (log.columns.shape[2] - num_heads * head_dim) // state_size
    kernels, stream = target_of(ssm_state)
    # fmt: off
    kernels.fold_states(
        num_copies, copies_address, state_base.data_ptr(), num_heads, head_dim, num_groups, state_size,
        weights.A.data_ptr(), weights.dt_bias.data_ptr(), weights.dt_min, weights.dt_max,
        conv_state.data_ptr(), conv_state.stride(0), ssm_state.data_ptr(), ssm_state.stride(0),
        state_dtype_code(op, "ssm_state", ssm_state),
        log.columns.data_ptr(), log.columns.stride(0), log.dt.data_ptr(), log.dt.stride(0),
        log.raw.data_ptr(), log.raw.stride(0), log.columns.shape[1], log.raw.shape[1],
        log.window.num_tokens, log.window.max_rewind, dtype_code(op, "conv_state", conv_state), stream,
    )
    # fmt: on


def _host_records(address: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    if count == 0:
        return np.zeros(0, STATE_COPY)
    return np.frombuffer(
        memoryview((ctypes.c_ubyte * (count * STATE_COPY.itemsize)).from_address(address)), STATE_COPY
    )
