"""The sampler against its float64 definition, alone against batched, and its frequencies against the distribution."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest
import torch

from headway import ops
from headway.ops import reference
from headway.ops.layout import HAS_TOKEN_MASK, PROCESSED_LOGPROBS, RESULT_ROW, ROW_SAMPLING
from headway.ops.reference.sample import philox_uniform
from tests.inputs import normal
from tests.ops.packets import Init, allocate, copy_to, result_rows, sampling_record

# Options alone and combined; seeds and positions vary by row.
OPTIONS = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "hot": {"temperature": 7.0},
    "cold": {"temperature": 1e-3},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "few": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top_k_one": {"temperature": 1.0, "top_k": 1},
    "top_k_all": {"temperature": 1.0, "top_k": 1 << 20},
    "top_p": {"temperature": 1.0, "top_p": 0.7},
    "top_p_tiny": {"temperature": 1.0, "top_p": 1e-6},
    "top_p_flat": {"temperature": 50.0, "top_p": 0.98},
    "min_p": {"temperature": 1.0, "min_p": 0.2},
    "all_filters": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "repetition": {"repetition_penalty": 1.7},
    "penalties": {"temperature": 0.9, "presence_penalty": 0.6, "frequency_penalty": 1.1},
    "all": {
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.001,
        "repetition_penalty": 0.8,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.3,
        "num_logprobs": 5,
    },
    "logprobs": {"temperature": 1.0, "num_logprobs": 3},
    "own_logprob": {"num_logprobs": 0},
    "masked": {"flags": HAS_TOKEN_MASK},
    "masked_all": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "num_logprobs": 3, "flags": HAS_TOKEN_MASK},
    "processed_greedy": {"num_logprobs": 4, "repetition_penalty": 1.5, "flags": PROCESSED_LOGPROBS},
    "processed": {"temperature": 0.6, "num_logprobs": 5, "flags": PROCESSED_LOGPROBS | HAS_TOKEN_MASK},
    "processed_filtered": {
        "temperature": 1.4,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.01,
        "frequency_penalty": 0.5,
        "num_logprobs": 2,
        "flags": PROCESSED_LOGPROBS,
    },
}
MAX_MODEL_LEN = 64


def set_row(buffers: ops.StepBuffers, index: int, init: Init, kv_len: int) -> None:
    """Row `init.row` is the step's row `index` and has kv_len tokens."""
    buffers.mirror.sampling.numpy().view(ROW_SAMPLING)[init.row, 0] = sampling_record(init)
    buffers.mirror.stop_ids[init.row, : len(init.stop_ids)] = torch.tensor(init.stop_ids, dtype=torch.int32)
    buffers.mirror.bias_ids[init.row, : len(init.bias)] = torch.tensor(list(init.bias), dtype=torch.int32)
    buffers.mirror.bias_values[init.row, : len(init.bias)] = torch.tensor(list(init.bias.values()))
    entries = init.bad_word_entries
    buffers.mirror.bad_words[init.row, : len(entries)] = torch.tensor(entries, dtype=torch.int32)
    buffers.inputs.rows[index] = init.row
    buffers.inputs.kv_lens[index] = kv_len


def random_rows(options: dict[str, float], vocab_size: int, num_rows: int, seed: int) -> ops.StepBuffers:
    """Rows with histories that repeat tokens, stop ids and biases. Repeats make the penalties count."""
    rng = random.Random(seed)
    sizes = {"max_rows": num_rows + 1, "max_model_len": MAX_MODEL_LEN, "vocab_size": mask_bits(vocab_size)}
    buffers = allocate("cpu", **sizes)
    common = [rng.randrange(vocab_size) for _ in range(6)]
    for index in range(num_rows):
        row = num_rows - index
        kv_len = rng.randrange(1, MAX_MODEL_LEN)
        limits = {
            "seed": rng.getrandbits(64),
            "prompt_len": rng.randrange(1, kv_len + 1),
            "min_total_len": rng.choice([0, kv_len, kv_len + 1]),
            "max_total_len": rng.choice([kv_len + 1, kv_len + 2, 1 << 30]),
        }
        stops = rng.sample(range(vocab_size), rng.randrange(0, min(vocab_size, 60)))
        bias = {rng.randrange(vocab_size): rng.uniform(-3, 3) for _ in range(rng.choice([0, 3]))}
        tokens = [
            rng.choice(common) if rng.random() < 0.5 else rng.randrange(vocab_size) for _ in range(kv_len)
        ]
        words = random_bad_words(rng, tokens, vocab_size)
        set_row(buffers, index, Init(row, 0, {**limits, **options}, stops, bias, words), kv_len)
        buffers.mirror.token_masks[row] = torch.from_numpy(random_mask(rng, vocab_size))
        buffers.mirror.history[row, :kv_len] = torch.tensor(tokens, dtype=torch.int32)
        buffers.mirror.history[row, kv_len:] = -(1 << 30)  # must not be read
    return buffers


def random_bad_words(rng: random.Random, tokens: list[int], vocab_size: int) -> list[list[int]]:
    """Some whose beginning the text ends with, some that come close, some longer than the text."""
    words = []
    for _ in range(rng.choice([0, 0, 2, 40])):
        num_before = rng.randrange(min(len(tokens), 5) + 1)
        word = [*tokens[len(tokens) - num_before :], rng.randrange(vocab_size)]
        if rng.random() < 0.3:
            word[rng.randrange(len(word))] = rng.randrange(vocab_size)
        words.append(word if rng.random() < 0.9 else tokens + tokens + word)
    return [word for word in words if len(word) < 20]


def mask_bits(vocab_size: int) -> int:
    return max(1 << 13, 1 << (vocab_size - 1).bit_length())


def random_mask(rng: random.Random, vocab_size: int) -> npt.NDArray[np.int32]:
    """[mask_bits / 32] bits beyond the vocabulary are set at random too."""
    bits = np.array([rng.random() < 0.4 for _ in range(mask_bits(vocab_size))])
    bits[rng.randrange(vocab_size)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def assert_same_results(
    actual: ops.StepBuffers, expected: ops.StepBuffers, count: int, atol: float = 3e-6
) -> None:
    got, want = result_rows(actual, count), result_rows(expected, count)
    for name in ("row", "token", "rank", "is_stopped", "is_bad"):
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    np.testing.assert_allclose(got["logprob"], want["logprob"], atol=atol, rtol=1e-6)
    top_ids = expected.results.top_ids[:count].numpy()
    np.testing.assert_array_equal(actual.results.top_ids[:count].cpu().numpy(), top_ids)
    used = top_ids >= 0
    got_tops, want_tops = (b.results.top_logprobs[:count].cpu().numpy()[used] for b in (actual, expected))
    np.testing.assert_allclose(got_tops, want_tops, atol=atol, rtol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("vocab_size", [7, 67, 1000, 4099])
def test_against_the_definition(options, vocab_size, device):
    count = 24
    expected = random_rows(options, vocab_size, count, seed=vocab_size)
    actual = copy_to(expected, device)
    logits = normal(count, vocab_size, scale=2.5)
    padded = torch.full((count, vocab_size + 5), float("nan"))
    padded[:, :vocab_size] = logits
    given = padded.to(device)[:, :vocab_size]
    reference.sample_ref(expected, logits)
    ops.sample(actual, given)
    assert_same_results(actual, expected, count)
    assert torch.equal(given.cpu(), logits), "logits must not be modified"


def unedited_rows(name: str, vocab_size: int, count: int) -> ops.StepBuffers:
    """All but the last row of the step, whose logits may have a bias and lose tokens."""
    buffers = random_rows(OPTIONS[name], vocab_size, count, seed=vocab_size)
    sampling = buffers.mirror.sampling.numpy().view(ROW_SAMPLING)
    for field in ("num_logit_bias", "num_bad_words", "min_total_len"):
        sampling[field][2:] = 0  # row `count - index` is the step's row index
    return buffers


LARGEST = pytest.param(262144, 262144, marks=pytest.mark.gpu)  # takes seconds a case on a CPU
DRAWN = ["temperature", "cold", "hot", "top_p", "top_p_tiny", "min_p", "few", "all_filters"]


@pytest.mark.parametrize("name", ["greedy", "top_k", *DRAWN])
@pytest.mark.parametrize("vocab_size", [20011, 65536, pytest.param(262147, marks=pytest.mark.gpu)])
def test_large_vocabularies(name, vocab_size, device):
    """Several pieces a row; among the rows one of ties, one that is nearly all -inf, and a flat one, all unedited."""
    count = 6
    expected = unedited_rows(name, vocab_size, count)
    actual = copy_to(expected, device)
    logits = normal(count, vocab_size, scale=2.5)
    logits[1] = logits[1].round()
    logits[2, 40:] = float("-inf")
    logits[3] *= 1e-3
    reference.sample_ref(expected, logits)
    ops.sample(actual, logits.to(device))
    assert_same_results(actual, expected, count)


PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2}
EDITED = {
    "greedy": PENALTIES,
    "temperature": {"temperature": 0.8, **PENALTIES},
    "few": {"temperature": 0.9, "top_k": 30, "top_p": 0.9, **PENALTIES},
    "top_p": {"temperature": 0.8, "top_p": 0.9, **PENALTIES},
    "min_p": {"temperature": 1.1, "min_p": 0.05, "repetition_penalty": 0.7},
    "top_p_min_p": {"temperature": 1.5, "top_p": 0.95, "min_p": 0.01, **PENALTIES},
    "masked_greedy": {"flags": HAS_TOKEN_MASK},
    "masked_top_p": {"temperature": 0.8, "top_p": 0.9, "flags": HAS_TOKEN_MASK},
    "masked_few": {"temperature": 0.8, "top_k": 64, "flags": HAS_TOKEN_MASK, **PENALTIES},
    "many": {"temperature": 0.8, "top_k": 400, "top_p": 0.9, **PENALTIES},
    "greedy_logprobs": {"num_logprobs": 5, **PENALTIES},
    "top_p_logprobs": {"temperature": 0.8, "top_p": 0.9, "num_logprobs": 3, **PENALTIES},
    "few_own_logprob": {"temperature": 2.0, "top_k": 30, "num_logprobs": 0, **PENALTIES},
}


@pytest.mark.parametrize("options", EDITED.values(), ids=EDITED)
@pytest.mark.parametrize(("vocab_size", "pitch"), [(20011, 20012), (30013, 30014), (65536, 65536), LARGEST])
def test_edited_rows_of_large_vocabularies(options, vocab_size, pitch, device):
    """Among them a row whose best token has been said, a flat one, one of ties, one with NaN, one nearly empty."""
    count = 8
    expected = random_rows(options, vocab_size, count, seed=vocab_size)
    logits = normal(count, vocab_size, scale=2.0)
    said = expected.mirror.history[count, 0]  # row `count - index` is the step's row index
    logits[0, said] = 30.0
    logits[1] *= 1e-3
    logits[2] = logits[2].round()
    logits[3, vocab_size - 1] = float("nan")
    logits[4, :-50] = float("-inf")
    actual = copy_to(expected, device)
    padded = torch.full((count, pitch), float("nan"))
    padded[:, :vocab_size] = logits
    reference.sample_ref(expected, logits)
    ops.sample(actual, padded.to(device)[:, :vocab_size])
    assert result_rows(actual, count)["is_bad"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert_same_results(actual, expected, count)


@pytest.mark.parametrize("name", ["greedy", *DRAWN])
def test_parts_of_a_vocabulary_that_differ_in_weight(name, device):
    """What is likely lies in one part of the vocabulary, or in parts far from each other; rows are not aligned."""
    count, vocab_size = 12, 30013
    expected = unedited_rows(name, vocab_size, count)
    actual = copy_to(expected, device)
    logits = normal(count, vocab_size, scale=2.0)
    logits[:, 8192:16384] -= 60.0
    logits[1::4, 16384:24576] += 9.0
    logits[2::4, :8192] = -1e30
    logits[3::4] -= 200.0
    padded = torch.full((count, vocab_size + 2), float("nan"))
    padded[:, :vocab_size] = logits
    reference.sample_ref(expected, logits)
    ops.sample(actual, padded.to(device)[:, :vocab_size])
    assert_same_results(actual, expected, count)


@pytest.mark.parametrize("name", ["greedy", "temperature", "top_p", "few"])
def test_a_vocabulary_beyond_any_model(name, device):
    count, vocab_size = 2, 540_001
    expected = unedited_rows(name, vocab_size, count)
    actual = copy_to(expected, device)
    logits = normal(count, vocab_size, scale=2.5)
    reference.sample_ref(expected, logits)
    ops.sample(actual, logits.to(device))
    assert_same_results(actual, expected, count)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ties_go_to_the_lower_id(options, device):
    """Logits of a few values only."""
    count, vocab_size = 24, 300
    expected = random_rows(options, vocab_size, count, seed=3)
    actual = copy_to(expected, device)
    logits = normal(count, vocab_size).round()
    reference.sample_ref(expected, logits)
    ops.sample(actual, logits.to(device))
    assert_same_results(actual, expected, count)


ALONE = {name: OPTIONS[name] for name in ("all", "temperature", "top_p", "few")} | {
    "edited_top_p": EDITED["top_p"],
    "edited_few": EDITED["few"],
    "edited_logprobs": EDITED["top_p_logprobs"],
}


@pytest.mark.parametrize("options", ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("vocab_size", [4099, 20011])
def test_a_row_alone_is_bit_equal(options, vocab_size, device):
    count = 9
    buffers = copy_to(random_rows(options, vocab_size, count, seed=5), device)
    logits = normal(count, vocab_size, scale=2.0).to(device)
    ops.sample(buffers, logits)
    together = copy_to(buffers, "cpu")
    for index in range(count):
        for name in ("rows", "kv_lens"):
            getattr(buffers.inputs, name)[0] = getattr(together.inputs, name)[index]
        ops.sample(buffers, logits[index : index + 1])
        alone = copy_to(buffers, "cpu").results
        for name in ("rows", "top_ids", "top_logprobs"):
            assert torch.equal(getattr(alone, name)[0], getattr(together.results, name)[index]), name


def test_bad_logits_void_their_row_only(device):
    count, vocab_size = 5, 130
    expected = random_rows(OPTIONS["all"], vocab_size, count, seed=6)
    actual = copy_to(expected, device)
    logits = normal(count, vocab_size)
    logits[1, 129] = float("nan")
    logits[3, 0] = float("inf")
    logits[4, 5] = float("-inf")  # a masked token, not a fault
    reference.sample_ref(expected, logits)
    ops.sample(actual, logits.to(device))
    assert result_rows(actual, count)["is_bad"].tolist() == [0, 1, 0, 1, 0]
    assert_same_results(actual, expected, count)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_when_nothing_is_left_the_lowest_id_is_taken(options, device):
    count, vocab_size = 2, 40
    buffers = allocate("cpu", max_rows=count + 1)
    for index in range(count):
        bias = {5: 1.0} if index else {}
        set_row(buffers, index, Init(index + 1, 0, dict(options), bias=bias), kv_len=3)
    buffers = copy_to(buffers, device)
    ops.sample(buffers, torch.full((count, vocab_size), float("-inf"), device=device))
    rows = result_rows(buffers, count)
    assert rows["token"].tolist() == [0, 0]
    assert rows["is_bad"].tolist() == [0, 0]


def test_nothing_of_a_mask_is_sampled(device):
    """All but one token masked: that one, whatever else is asked for, down to a logit of -inf elsewhere."""
    vocab_size, count = 1000, 8
    buffers = allocate("cpu", max_rows=count + 1)
    for index in range(count):
        options = {"temperature": index % 2, "flags": HAS_TOKEN_MASK, "top_p": 0.5}
        set_row(buffers, index, Init(index + 1, 0, options, bias={5: 100.0}), kv_len=3)
        buffers.mirror.token_masks[index + 1] = 0
        buffers.mirror.token_masks[index + 1, 31] = 1 << index
    buffers = copy_to(buffers, device)
    ops.sample(buffers, normal(count, vocab_size, scale=10.0).to(device))
    assert result_rows(buffers, count)["token"].tolist() == [31 * 32 + index for index in range(count)]


@pytest.mark.parametrize("vocab_size", [7, 67, 4099])
@pytest.mark.parametrize("num_alternatives", [0, 3])
def test_scores_against_the_definition(vocab_size, num_alternatives, device):
    """In two parts, behind the results of sampled rows, which stay as they are."""
    num_sampled, count = 3, 6
    expected = random_rows({"num_prompt_logprobs": num_alternatives}, vocab_size, 8, seed=4)
    expected.inputs.score_rows[:] = torch.tensor([2, 2, 5, 5, 5, 7])
    expected.inputs.score_targets[:] = torch.tensor([0, 6, 1, 2, vocab_size - 1, 3])
    expected.results.rows.fill_(9)
    actual = copy_to(expected, device)
    logits = normal(count, vocab_size, scale=2.5)
    logits[4, 1] = float("inf")
    for begin, end in ((0, 4), (4, 6)):
        part = logits[begin:end]
        reference.score_ref(expected, part, first_score=begin, num_sampled=num_sampled)
        ops.score(actual, part.to(device), first_score=begin, num_sampled=num_sampled)
    assert_same_results(actual, expected, num_sampled + count)
    scored = result_rows(expected, num_sampled + count)[num_sampled:]
    assert scored["is_bad"].tolist() == [0, 0, 0, 0, 1, 0]
    assert scored["token"][0] == 0
    assert result_rows(actual, num_sampled).tobytes() == bytes([9]) * num_sampled * RESULT_ROW.itemsize


def test_the_best_alternative_and_the_chosen_token_have_the_same_bits(device):
    """What clients compare to see whether a token was the most likely one."""
    for options in (OPTIONS["logprobs"], OPTIONS["processed"], OPTIONS["processed_greedy"]):
        buffers = copy_to(random_rows(options, 300, 24, seed=8), device)
        ops.sample(buffers, normal(24, 300, scale=6.0).to(device))
        rows, tops = result_rows(buffers, 24), buffers.results
        ids, logprobs = tops.top_ids[:24].cpu().numpy(), tops.top_logprobs[:24].cpu().numpy()
        places = ids == rows["token"][:, None]
        assert places.any()
        assert (logprobs[places] == np.repeat(rows["logprob"], places.sum(1))).all()


def test_the_dummy_row_samples_nothing(device):
    buffers = copy_to(random_rows(OPTIONS["temperature"], 50, 3, seed=7), device)
    buffers.inputs.rows[1] = 0
    ops.sample(buffers, normal(3, 50).to(device))
    record = result_rows(buffers, 3)[1]
    assert (record["row"], record["token"], record["is_stopped"], record["is_bad"]) == (0, 0, 0, 0)


def test_philox_known_answers():
    """From the authors' kat_vectors: philox4x32 10, counter and key all zero."""
    assert philox_uniform(0, 0) == (0x6627E8D5 >> 8) * 2.0**-24


def test_frequencies_are_the_distribution(device):
    """4,000 positions of one seed: a chi-square over 16 tokens stays below its 99.9 % point (df 15: 37.7)."""
    vocab_size, num_draws = 16, 4000
    buffers = allocate("cpu", max_rows=num_draws + 1, max_model_len=8)
    for index in range(num_draws):
        set_row(
            buffers,
            index,
            Init(index + 1, 0, {"seed": 42, "temperature": 1.0, "max_total_len": 1 << 30}),
            index,
        )
    logits = normal(1, vocab_size, seed=3)
    buffers = copy_to(buffers, device)
    ops.sample(buffers, logits.expand(num_draws, -1).contiguous().to(device))
    counts = np.bincount(result_rows(buffers, num_draws)["token"], minlength=vocab_size)
    expected = logits.double().softmax(-1)[0].numpy() * num_draws
    assert ((counts - expected) ** 2 / expected).sum() < 37.7
