"""Steps whose rows ask for different things, among them bad ones, over vocabularies of every odd size."""

from __future__ import annotations

import random

import pytest
import torch

from headway import ops
from headway.ops import reference
from headway.ops.layout import HAS_TOKEN_MASK, PROCESSED_LOGPROBS, ROW_SAMPLING
from tests.inputs import normal
from tests.ops.packets import copy_to, result_rows
from tests.ops.test_sample import assert_same_results, random_rows

FLAGS = [0, 0, HAS_TOKEN_MASK, PROCESSED_LOGPROBS, HAS_TOKEN_MASK | PROCESSED_LOGPROBS]
# Each knob off, ordinary, and at its ends.
KNOBS = {
    "temperature": [0.0, 0.0, 0.7, 1.0, 2.0, 0.01, 100.0],
    "top_k": [0, 0, 1, 2, 50, 1000, 1 << 30],
    "top_p": [1.0, 1.0, 0.9, 0.5, 1e-9, 0.999999],
    "min_p": [0.0, 0.0, 0.05, 1.0],
    "repetition_penalty": [1.0, 1.0, 1.3, 0.5, 100.0],
    "presence_penalty": [0.0, 0.0, 2.0, -2.0],
    "frequency_penalty": [0.0, 0.0, 2.0, -2.0],
    "num_logprobs": [-1, -1, 0, 1, 5],
    "flags": FLAGS,
}
SMALL = [1, 2, 3, 31, 32, 33, 257]
EDGES = [8191, 8192, 8193, 16385, 24577]
MODELS = [32003, 50257, 131_073, 151_936, 256_000, 262_144]
HUGE = 1e38  # over a temperature below 0.3 it is infinite in float32, so the greedy token is taken
ATOL = (
    1e-4  # of log-probabilities: logits over a temperature of 0.01, a thousand, have steps of 6e-5 in float32
)


def mixed_rows(vocab_size: int, num_rows: int, seed: int) -> ops.StepBuffers:
    """Every row with knobs of its own; one is the dummy."""
    rng = random.Random(seed)
    buffers = random_rows({}, vocab_size, num_rows, seed=seed)
    sampling = buffers.mirror.sampling.numpy().view(ROW_SAMPLING)
    for row in range(1, num_rows + 1):
        for name, values in KNOBS.items():
            sampling[name][row] = rng.choice(values)
    huge_rows = buffers.inputs.rows[8:num_rows:9].numpy()
    sampling["flags"][huge_rows] &= ~PROCESSED_LOGPROBS  # of HUGE they are those of the undivided logits
    buffers.inputs.rows[num_rows // 2] = 0
    return buffers


def hostile_logits(vocab_size: int, num_rows: int, seed: int) -> torch.Tensor:
    """Ordinary rows, ties, rows of -inf, of one token, of huge values, bad ones, and a logit too large to divide."""
    logits = normal(num_rows, vocab_size, scale=2.5, seed=seed)
    logits[1::9] = logits[1::9].round()
    logits[2::9] = float("-inf")
    logits[3::9, 1:] = float("-inf")
    logits[4::9, -1] = float("nan")
    logits[5::9, vocab_size // 2] = float("inf")
    logits[6::9] *= 1e30
    logits[7::9] = 0.0
    logits[8::9, vocab_size // 3] = HUGE
    return logits


@pytest.mark.parametrize("vocab_size", [*SMALL, *EDGES])
def test_rows_of_all_kinds(vocab_size, device):
    assert_mixed_step(vocab_size, device)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", MODELS)
def test_vocabularies_of_models(vocab_size):
    assert_mixed_step(vocab_size, "cuda")


def assert_mixed_step(vocab_size: int, device: str) -> None:
    """Against the definition, between poisoned columns; then each of some rows alone, to the bit."""
    num_rows = 27
    expected = mixed_rows(vocab_size, num_rows, seed=vocab_size)
    actual = copy_to(expected, device)
    logits = hostile_logits(vocab_size, num_rows, seed=vocab_size)
    padded = torch.full((num_rows, vocab_size + 3), float("nan"))
    padded[:, :vocab_size] = logits
    given = padded.to(device)[:, :vocab_size]
    ops.sample(actual, given)
    reference.sample_ref(expected, logits)
    assert_same_results(actual, expected, num_rows, ATOL)
    together = copy_to(actual, "cpu")
    for index in range(0, num_rows, 5):
        for name in ("rows", "kv_lens"):
            getattr(actual.inputs, name)[0] = getattr(together.inputs, name)[index]
        ops.sample(actual, given[index : index + 1])
        assert result_rows(actual, 1).tobytes() == result_rows(together, num_rows)[index].tobytes(), (
            f"row {index}"
        )


@pytest.mark.gpu
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(512, 8193), (300, 32003), (1024, 257)])
def test_as_many_rows_as_a_step_has(num_rows, vocab_size):
    expected = mixed_rows(vocab_size, num_rows, seed=num_rows)
    actual = copy_to(expected, "cuda")
    logits = hostile_logits(vocab_size, num_rows, seed=num_rows)
    reference.sample_ref(expected, logits)
    ops.sample(actual, logits.cuda())
    assert_same_results(actual, expected, num_rows, ATOL)


def test_no_rows(device):
    buffers = copy_to(random_rows({}, 300, 2, seed=1), device)
    buffers.results.rows.fill_(7)
    ops.sample(buffers, torch.empty(0, 300, device=device))
    assert bool((buffers.results.rows == 7).all())


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [20011, 262_147])
def test_scores_over_large_vocabularies(vocab_size):
    """The first, the last and other tokens of the vocabulary, some of them tied with the best."""
    num_sampled, count = 3, 6
    expected = random_rows({"num_prompt_logprobs": 5}, vocab_size, 8, seed=4)
    expected.inputs.score_rows[:] = torch.tensor([2, 2, 5, 5, 5, 7])
    expected.inputs.score_targets[:] = torch.tensor([0, vocab_size - 1, 1, 8192, 8191, 3])
    actual = copy_to(expected, "cuda")
    logits = normal(count, vocab_size, scale=2.5)
    logits[2:4] = logits[2:4].round()
    logits[4, 8000] = float("nan")
    reference.score_ref(expected, logits, first_score=0, num_sampled=num_sampled)
    ops.score(actual, logits.cuda(), first_score=0, num_sampled=num_sampled)
    assert_same_results(actual, expected, num_sampled + count)
