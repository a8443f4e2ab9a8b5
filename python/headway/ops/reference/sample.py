"""The sampler's definition, step by step, in float64 numpy.

Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from headway.ops.layout import HAS_TOKEN_MASK, PROCESSED_LOGPROBS, RESULT_ROW, ROW_SAMPLING
from headway.ops.step import StepBuffers

Floats = npt.NDArray[np.float64]


def philox_uniform(seed: int, position: int) -> float:
    """u in [0, 1) with 24 bits: the first word of Philox4x32-10(key = seed, counter = (position, 0, 0, 0))."""
    mask = 0xFFFFFFFF
    counter = [position & mask, 0, 0, 0]
    key = [seed & mask, seed >> 32]
    for _ in range(10):
        product0 = 0xD2511F53 * counter[0]
        product1 = 0xCD9E8D57 * counter[2]
        counter = [
            (product1 >> 32) ^ counter[1] ^ key[0],
            product1 & mask,
            (product0 >> 32) ^ counter[3] ^ key[1],
            product0 & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return (counter[0] >> 8) * 2.0**-24


def sample_ref(buffers: StepBuffers, logits: Tensor) -> None:
    """See `ops.sample`. The dummy row gets token 0 and nothing else."""
    results = buffers.results.rows.numpy().view(RESULT_ROW)[:, 0]
    for index in range(logits.shape[0]):
        results[index] = np.zeros((), RESULT_ROW)
        buffers.results.top_ids[index] = -1
        buffers.results.top_logprobs[index] = 0.0
        row = int(buffers.inputs.rows[index])
        if row:
            _sample_row(buffers, index, row, logits[index].double().numpy(), results)


def _sample_row(buffers: StepBuffers, index: int, row: int, raw: Floats, results: npt.NDArray[Any]) -> None:
    params = buffers.mirror.sampling.numpy().view(ROW_SAMPLING)[row, 0]
    result = results[index : index + 1]
    result["row"] = row
    kv_len = int(buffers.inputs.kv_lens[index])
    if np.isnan(raw).any() or np.isposinf(raw).any():
        result["is_bad"] = 1
        return
    stop_ids = buffers.mirror.stop_ids.numpy()[row, : params["num_stop_ids"]]
    values = adjusted_logits(buffers, row, kv_len, raw)
    token = choose(values, params, philox_uniform(int(params["seed"]), kv_len))
    is_end = token in stop_ids and kv_len >= params["min_total_len"]
    result["token"] = token
    result["is_stopped"] = is_end or kv_len + 1 >= params["max_total_len"]
    if params["num_logprobs"] >= 0:
        is_processed = params["flags"] & PROCESSED_LOGPROBS
        reported = values / (float(params["temperature"]) or 1.0) if is_processed else raw
        _report(buffers, index, int(params["num_logprobs"]), reported, result)


def score_ref(buffers: StepBuffers, logits: Tensor, *, first_score: int, num_sampled: int) -> None:
    """See `ops.score`."""
    results = buffers.results.rows.numpy().view(RESULT_ROW)[:, 0]
    for place in range(logits.shape[0]):
        score, raw = first_score + place, logits[place].double().numpy()
        index, row = num_sampled + score, int(buffers.inputs.score_rows[score])
        results[index] = np.zeros((), RESULT_ROW)
        buffers.results.top_ids[index] = -1
        buffers.results.top_logprobs[index] = 0.0
        results[index]["row"] = row
        results[index]["is_bad"] = np.isnan(raw).any() or np.isposinf(raw).any()
        if not results[index]["is_bad"]:
            params = buffers.mirror.sampling.numpy().view(ROW_SAMPLING)[row, 0]
            results[index]["token"] = buffers.inputs.score_targets[score]
            _report(buffers, index, int(params["num_prompt_logprobs"]), raw, results[index : index + 1])


def adjusted_logits(buffers: StepBuffers, row: int, kv_len: int, raw: Floats) -> Floats:
    """Bias, then what may not be sampled, then penalties."""
    mirror = buffers.mirror
    params = mirror.sampling.numpy().view(ROW_SAMPLING)[row, 0]
    values = raw.copy()
    num_bias = params["num_logit_bias"]
    np.add.at(values, mirror.bias_ids.numpy()[row, :num_bias], mirror.bias_values.numpy()[row, :num_bias])
    if params["flags"] & HAS_TOKEN_MASK:
        bits = np.unpackbits(mirror.token_masks.numpy()[row].view(np.uint8), bitorder="little")
        values[bits[: len(values)] == 0] = -np.inf
    for word in bad_words_of(buffers, row):
        if (
            mirror.history[row, :kv_len].tolist()[kv_len - len(word) + 1 :] == word[:-1]
            and kv_len >= len(word) - 1
        ):
            values[word[-1]] = -np.inf
    if kv_len < params["min_total_len"]:
        values[mirror.stop_ids.numpy()[row, : params["num_stop_ids"]]] = -np.inf
    history = mirror.history.numpy()[row, :kv_len]
    seen = np.unique(history)
    repetition = float(params["repetition_penalty"])
    values[seen] = np.where(values[seen] > 0, values[seen] / repetition, values[seen] * repetition)
    counts = np.bincount(history[params["prompt_len"] :], minlength=len(raw))
    values -= params["frequency_penalty"] * counts + params["presence_penalty"] * (counts > 0)
    return values


def bad_words_of(buffers: StepBuffers, row: int) -> list[list[int]]:
    """Token sequences that may not be completed."""
    params = buffers.mirror.sampling.numpy().view(ROW_SAMPLING)[row, 0]
    entries, num_words = buffers.mirror.bad_words[row].tolist(), int(params["num_bad_words"])
    ends, tokens = [0, *entries[:num_words]], entries[num_words:]
    return [tokens[begin:end] for begin, end in pairwise(ends)]


def choose(values: Floats, params: npt.NDArray[Any], uniform: float) -> int:
    """Greedy, or temperature, top_k, top_p, min_p and the inverse CDF in vocabulary order."""
    if params["temperature"] == 0 or np.isneginf(values).all():
        return int(values.argmax())
    scaled = values / float(params["temperature"])
    masses = np.exp(scaled - scaled.max())
    kept = np.ones(len(masses), dtype=bool)
    order = np.lexsort((np.arange(len(masses)), -scaled))  # descending, ties lower id first
    if params["top_k"] > 0:
        kept[order[params["top_k"] :]] = False
    if params["top_p"] < 1:
        ranked = order[kept[order]]
        cumulative = np.cumsum(masses[ranked])
        enough = np.searchsorted(cumulative, float(params["top_p"]) * cumulative[-1], side="left")
        kept[ranked[enough + 1 :]] = False
    kept &= masses >= float(params["min_p"])
    cumulative = np.cumsum(np.where(kept, masses, 0.0))
    beyond = cumulative > uniform * cumulative[-1]
    return int(beyond.argmax())


def _report(buffers: StepBuffers, index: int, num_tops: int, raw: Floats, result: npt.NDArray[Any]) -> None:
    """By the logits in `raw`; where nothing is left of them, nothing but a log-probability of -inf."""
    token = int(result["token"][0])
    if np.isneginf(raw).all() and num_tops >= 0:
        result["logprob"], result["rank"] = -np.inf, 1
        return
    logprobs = raw - raw.max() - np.log(np.exp(raw - raw.max()).sum())
    result["logprob"] = logprobs[token]
    result["rank"] = 1 + int((raw > raw[token]).sum())
    best = np.lexsort((np.arange(len(raw)), -raw))[:num_tops]
    buffers.results.top_ids.numpy()[index, : len(best)] = best
    buffers.results.top_logprobs.numpy()[index, : len(best)] = logprobs[best]
