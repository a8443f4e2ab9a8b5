"""Runs the kernels of prompt steps before the first prompt: code is loaded, workspaces are sized. Knows no request.

Everything happens on the dummy row, block and slot, which are zeros again afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from headway.engine.batch import StepBatch
from headway.models.caches import ModelCaches
from headway.ops import StepBuffers

MAX_REHEARSAL_S = 1.0
Compute = Callable[[StepBatch], object]


def prompt_sizes(max_tokens: int) -> tuple[int, ...]:
    """Lengths of prompts, shortest first: products choose their kernels by it, roughly by powers of four."""
    ladder = [2, 16, 64, 128, 512, 2048, 8192]
    return (*[size for size in ladder if size < max_tokens], max_tokens)


def rehearse_prompts(
    buffers: StepBuffers,
    caches: ModelCaches,
    compute: Compute,
    max_tokens: int,
    synchronize: Callable[[], None],
) -> None:
    """One prompt of each size, while there is time. Legal where no row is held."""
    begin_s = time.perf_counter()
    for num_tokens in prompt_sizes(max_tokens):
        if time.perf_counter() - begin_s >= MAX_REHEARSAL_S:
            break
        compute(dummy_prompt(buffers, num_tokens))
        synchronize()
    for cache in (*caches.conv_state, *caches.ssm_state, *caches.keys, *caches.values):
        cache[0].zero_()
    synchronize()


def dummy_prompt(buffers: StepBuffers, num_tokens: int) -> StepBatch:
    """A prompt of the dummy row, as begin_step would have prepared it."""
    inputs = buffers.inputs
    for tensor in (inputs.token_ids, inputs.token_rows):
        tensor[:num_tokens].zero_()
    for tensor in (inputs.rows, inputs.row_start, inputs.read_slots, inputs.write_slots, inputs.state_base):
        tensor[:1].zero_()
    device = inputs.positions.device
    inputs.positions[:num_tokens] = torch.arange(num_tokens, dtype=torch.int32, device=device)
    inputs.query_start[0].zero_()
    for tensor, value in (
        (inputs.query_start[1:2], num_tokens),
        (inputs.kv_lens[:1], num_tokens),
        (inputs.sample_tokens[:1], num_tokens - 1),
    ):
        tensor.fill_(value)
    return StepBatch(
        step=0,
        num_rows=1,
        num_decode_rows=0,
        num_sampled=1,
        num_tokens=num_tokens,
        max_query_len=num_tokens,
        max_kv_len=num_tokens,
        token_ids=inputs.token_ids[:num_tokens],
        positions=inputs.positions[:num_tokens],
        token_rows=inputs.token_rows[:num_tokens],
        rows=inputs.rows[:1],
        query_start=inputs.query_start[:2],
        row_start=inputs.row_start[:1],
        kv_lens=inputs.kv_lens[:1],
        read_slots=inputs.read_slots[:1],
        write_slots=inputs.write_slots[:1],
        state_base=inputs.state_base[:1],
        sample_tokens=inputs.sample_tokens[:1],
        block_table=buffers.mirror.block_table,
    )
