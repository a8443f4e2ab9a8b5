"""Greedy rows with nothing to edit and nothing to report: the sampler's last kernel may leave before such rows' end."""

from __future__ import annotations

import pytest

from headway import ops
from headway.ops import reference
from headway.ops.layout import ROW_SAMPLING
from tests.inputs import normal
from tests.ops.packets import copy_to
from tests.ops.test_sample import OPTIONS, assert_same_results, random_rows

# What every third row asks for, from the second on. "processed" rows are made by teams of blocks.
OTHERS = ["greedy", "few", "repetition", "own_logprob", "processed"]
TURNS = 3
# The last: so many rows that blocks of the last kernel wait for those before them.
MANY_ROWS = pytest.param(70, 9000, marks=pytest.mark.gpu)
SIZES = [(1, 7), (5, 8192), pytest.param(9, 20011, marks=pytest.mark.gpu), MANY_ROWS]


def plain_rows(vocab_size: int, num_rows: int, other: str) -> ops.StepBuffers:
    """Rows with stop ids and length limits; the third is a dummy row."""
    buffers = random_rows({}, vocab_size, num_rows, seed=num_rows)
    sampling = buffers.mirror.sampling.numpy().view(ROW_SAMPLING)
    for name in ("num_logit_bias", "num_bad_words", "min_total_len"):
        sampling[name] = 0
    for index in range(1, num_rows, 3):
        row = int(buffers.inputs.rows[index])
        for name, value in OPTIONS[other].items():
            sampling[name][row] = value
    if num_rows > 2:
        buffers.inputs.rows[2] = 0
    return buffers


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(("num_rows", "vocab_size"), SIZES)
def test_against_the_definition(num_rows, vocab_size, other, device):
    """Calls follow each other on other logits, with ties and without, and never on what the last one left."""
    expected = plain_rows(vocab_size, num_rows, other)
    actual = copy_to(expected, device)
    logits = [normal(num_rows, vocab_size, scale=2.5, seed=turn) for turn in range(TURNS)]
    logits[1] = logits[1].round()
    given = [part.to(device) for part in logits]
    for part in given:
        ops.sample(actual, part)
    reference.sample_ref(expected, logits[-1])
    assert_same_results(actual, expected, num_rows)
    ops.sample(actual, given[1])
    reference.sample_ref(expected, logits[1])
    assert_same_results(actual, expected, num_rows)


@pytest.mark.parametrize("num_rows", [8, pytest.param(70, marks=pytest.mark.gpu)])
def test_rows_without_a_largest_logit(num_rows, device):
    """NaN and +inf void a row; where all is -inf the lowest id is taken; of -0 and 0 the lower id."""
    vocab_size = 9001
    expected = plain_rows(vocab_size, num_rows, "greedy")
    actual = copy_to(expected, device)
    logits = normal(num_rows, vocab_size)
    logits[0, 8999] = float("nan")
    logits[1, 3] = float("inf")
    logits[3] = float("-inf")
    logits[4] = -1.0
    logits[4, 700] = -0.0
    logits[4, 8500] = 0.0
    logits[5, 0] = -float("nan")
    reference.sample_ref(expected, logits)
    ops.sample(actual, logits.to(device))
    assert_same_results(actual, expected, num_rows)
