"""From logits to tokens: `sample` chooses one a row, `score` says how likely given ones were."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.errors import ArgumentError
from headway.ops.backend import target_of
from headway.ops.checks import check_inner_dense, check_same_dtype
from headway.ops.step import StepBuffers


def sample(buffers: StepBuffers, logits: Tensor) -> None:
    """Samples one token for each of the step's first Rs rows; the results stay on the device.

    Args:
        buffers: results are updated; the mirror's sampling parameters, history, lists and masks are read.
        logits: [Rs, V] float32, rows may be strided; not modified.
    """
    if logits.shape[0] > buffers.max_rows:
        raise ArgumentError(
            f"sample: logits must have at most {buffers.max_rows} rows, got {logits.shape[0]}"
        )
    inputs = buffers.inputs
    _launch("sample", buffers, logits, inputs.rows.data_ptr(), inputs.kv_lens.data_ptr(), 0, first_result=0)


def score(buffers: StepBuffers, logits: Tensor, *, first_score: int, num_sampled: int) -> None:
    """Reports how likely the prompt's own tokens were, by the model's logits as they are.

    Args:
        buffers: results are updated, entries num_sampled + first_score and on; of the mirror the sampling parameters
            are read, of the inputs the scored tokens first_score and on.
        logits: [n, V] float32 at the step's scored tokens first_score .. first_score + n - 1; not modified.
        first_score: a step's tokens may be scored a few at a time.
        num_sampled: Rs of the step.
    """
    num_scores = buffers.inputs.score_rows.shape[0]
    if not 0 <= first_score <= num_scores - logits.shape[0]:
        raise ArgumentError(
            f"score: at most {num_scores} tokens can be scored, got {logits.shape[0]} from {first_score} on"
        )
    rows = buffers.inputs.score_rows[first_score:].data_ptr()
    targets = buffers.inputs.score_targets[first_score:].data_ptr()
    _launch("score", buffers, logits, rows, 0, targets, first_result=num_sampled + first_score)


def _launch(
    op: str, buffers: StepBuffers, logits: Tensor, rows: int, kv_lens: int, targets: int, *, first_result: int
) -> None:
    num_rows, vocab_size = logits.shape
    max_vocab_size = 32 * buffers.mirror.token_masks.shape[1]
    if not 1 <= vocab_size <= max_vocab_size:
        raise ArgumentError(f"{op}: logits must have V = 1..{max_vocab_size} columns, got {vocab_size}")
    check_same_dtype(op, "logits", logits, torch.float32)
    check_inner_dense(op, "logits", logits)
    kernels, stream = target_of(logits)
    scratch, scan = None, None
    if logits.is_cuda:
        scratch = _bytes_like(logits, kernels.sample_scratch_bytes(num_rows, vocab_size))
        scan = _bytes_like(logits, kernels.sample_scan_bytes(num_rows, vocab_size))
    results = buffers.results
    kernels.sample(
        num_rows,
        vocab_size,
        buffers.max_logprobs,
        logits.data_ptr(),
        logits.stride(0),
        rows,
        kv_lens,
        targets,
        buffers.mirror_arguments,
        results.rows[first_result:].data_ptr(),
        results.top_ids[first_result:].data_ptr(),
        results.top_logprobs[first_result:].data_ptr(),
        0 if scratch is None else scratch.data_ptr(),
        0 if scan is None else scan.data_ptr(),
        stream,
    )


def _bytes_like(logits: Tensor, num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=logits.device)
