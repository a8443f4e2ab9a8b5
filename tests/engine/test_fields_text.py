"""Fields that speak of text, over the shipped model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from headway.llm import LLM
from headway.request import SamplingParams
from headway.sampling.bad_words import bad_word_tokens

PROMPT = "def fib(n):"
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> Iterator[LLM]:
    with LLM(tiny_model_dir, device="cpu", max_num_seqs=4, max_model_len=256) as llm:
        yield llm


def text_of(llm: LLM, **fields: object) -> str:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, **fields)
    return llm.generate(PROMPT, params)[0].outputs[0].text


def test_bad_words_as_text(llm: LLM) -> None:
    free = text_of(llm)
    assert "fixing" in free
    banned = text_of(llm, bad_words=["fixing"])
    assert banned != free
    tokenizer = llm.get_tokenizer()
    ids = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=24, bad_words=["fixing"]))[0]
    for word in bad_word_tokens(["fixing"], lambda text: tokenizer.encode(text, add_special_tokens=False)):
        tokens = ids.outputs[0].token_ids
        assert not any(tokens[i : i + len(word)] == word for i in range(len(tokens)))


def test_a_word_is_banned_with_and_without_a_space() -> None:
    def encode(text: str) -> list[int]:
        return {"cat": [1], " cat": [2], "dog": [3, 4], " dog": [9, 3, 4]}[text]

    assert bad_word_tokens(["cat", " dog", [7, 8], "cat"], encode) == [[1], [2], [3, 4], [7, 8]]


@pytest.mark.parametrize("word", ["\n", "\n    ", " ", "\t", "\n    return"])
def test_bad_words_of_white_space_are_taken_as_they_stand(llm: LLM, word: str) -> None:
    """Without it nothing would be left of them, or another word."""
    tokenizer = llm.get_tokenizer()
    sequences = bad_word_tokens([word], lambda text: tokenizer.encode(text, add_special_tokens=False))
    assert [tokenizer.decode(sequence) for sequence in sequences] == [word]


def test_prompt_logprobs_are_what_the_tokens_score_when_sampled(llm: LLM) -> None:
    """The log-probabilities of a text as a prompt are those it had as an output."""
    output = llm.generate(
        PROMPT, SamplingParams(temperature=0.0, max_tokens=24, logprobs=3, ignore_eos=True)
    )[0]
    completion = output.outputs[0]
    whole = [*output.prompt_token_ids, *completion.token_ids]
    again = llm.generate(whole, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=3))[0]
    assert again.prompt_logprobs is not None
    assert len(again.prompt_logprobs) == len(whole)
    scored = again.prompt_logprobs[len(output.prompt_token_ids) :]
    for entries, sampled in zip(scored, completion.logprobs or [], strict=True):
        assert entries is not None
        assert entries.keys() == sampled.keys()
        for token in entries:
            assert entries[token].logprob == pytest.approx(sampled[token].logprob, abs=1e-4)
            assert entries[token].decoded_token == sampled[token].decoded_token
