"""What a reader finds of outputs whose text the server makes: whole characters, every token once, no stop token."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from headway.errors import EngineDeadError
from headway.remote.messages import Output
from headway.remote.output_text import OutputText
from headway.remote.reading import MAX_TOKENS_A_TURN, Reading
from headway.request import SamplingParams
from headway.server.client import EngineOutput, EngineRequest
from headway.text import Tokenizer
from tests.server.fake_engine import ASSETS

TOKENIZER = Tokenizer.from_dir(ASSETS)
WORDS = TOKENIZER.encode("return the value \U0001f600 of it", add_special_tokens=False)
STOP = TOKENIZER.encode("!", add_special_tokens=False)


def reading_of(**params: Any) -> Reading:
    request = EngineRequest("r", WORDS[:3], SamplingParams(**params))
    return Reading(1, request, OutputText.of(TOKENIZER, request))


def output(token_ids: list[int], num_output_tokens: int, reason: Any = None, index: int = 0) -> Output:
    return Output(1, index, "", token_ids, 3, num_output_tokens, 2, reason)


def all_of(reading: Reading) -> list[EngineOutput]:
    async def read() -> list[EngineOutput]:
        found: list[EngineOutput] = []
        while not reading.is_over:
            found += await reading.take()
        return found

    return asyncio.run(asyncio.wait_for(read(), 10))


def one_by_one(reading: Reading) -> Iterator[list[EngineOutput]]:
    """Each token as it comes, and what a reader then has."""
    reading.add(output(WORDS[:1], 1))
    yield asyncio.run(reading.take())
    for token_id in WORDS[1:]:
        reading.grow([token_id])
        yield asyncio.run(reading.take())
    reading.add(output([], len(WORDS), "length"))
    yield asyncio.run(reading.take())


def test_characters_come_whole_and_tokens_with_them() -> None:
    turns = list(one_by_one(reading_of()))
    assert [] in turns  # within the character
    outputs = [found for turn in turns for found in turn]
    assert all(found.text for found in outputs[:-1])
    assert not any("\ufffd" in found.text for found in outputs)
    assert "".join(found.text for found in outputs) == TOKENIZER.decode(WORDS)
    assert [token for found in outputs for token in found.token_ids] == WORDS
    assert [found.usage.num_output_tokens for found in outputs][-1] == len(WORDS)
    assert {(found.usage.num_prompt_tokens, found.usage.num_cached_tokens) for found in outputs} == {(3, 2)}


def test_what_waited_is_one_output() -> None:
    reading = reading_of()
    reading.add(output(WORDS[:2], 2))
    for token_id in WORDS[2:]:
        reading.grow([token_id])
    reading.add(output([], len(WORDS), "length"))
    (found,) = all_of(reading)
    assert (found.text, found.token_ids) == (TOKENIZER.decode(WORDS), WORDS)
    assert (found.usage.num_output_tokens, found.finish_reason) == (len(WORDS), "length")


@pytest.mark.parametrize(("reason", "is_included", "is_shown"), [
    ("stop", False, False), ("stop", True, True), ("length", False, True), ("abort", False, True),
])  # fmt: skip
def test_a_stop_token_is_a_token_and_no_text(reason: str, is_included: bool, is_shown: bool) -> None:
    reading = reading_of(include_stop_str_in_output=is_included)
    reading.add(output(WORDS + STOP, len(WORDS) + 1, reason))
    (found,) = all_of(reading)
    assert found.text == TOKENIZER.decode(WORDS) + "!" * is_shown
    assert found.token_ids == WORDS + STOP


@pytest.mark.parametrize("num_turns", [1, 2, 3])
@pytest.mark.parametrize("num_more", [-1, 0, 1])
def test_a_long_answer_is_made_in_turns(num_turns: int, num_more: int) -> None:
    num = num_turns * MAX_TOKENS_A_TURN + num_more
    token_ids = (WORDS * (1 + num // len(WORDS)))[: num - 1] + STOP
    reading = reading_of()
    reading.add(output(token_ids, num, "stop"))
    (found,) = all_of(reading)
    assert (found.text, found.token_ids) == (TOKENIZER.decode(token_ids[:-1]), token_ids)


def test_completions_have_their_texts_apart() -> None:
    reading = reading_of(n=2)
    for token_id in WORDS:
        for index in (0, 1):
            reading.add(output([token_id] * (1 + index), 1, None, index))
    for index in (0, 1):
        reading.add(output([], 1, "length", index))
    texts = {found.index: found.text for found in all_of(reading)}
    assert texts == {0: TOKENIZER.decode(WORDS), 1: TOKENIZER.decode([t for t in WORDS for _ in (0, 1)])}


def test_what_has_come_is_read_before_an_error() -> None:
    reading = reading_of()
    reading.add(output(WORDS[:2], 2))
    reading.fail(EngineDeadError("gone"))
    assert asyncio.run(reading.take())[0].token_ids == WORDS[:2]
    with pytest.raises(EngineDeadError, match="gone"):
        asyncio.run(reading.take())


@pytest.mark.parametrize("params", [
    {"stop": ["a"]}, {"logprobs": 0}, {"prompt_logprobs": 1}, {"detokenize": False},
])  # fmt: skip
def test_the_engine_makes_the_text_where_it_looks_at_it(params: dict[str, Any]) -> None:
    assert reading_of(**params).text is None


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert OutputText.of(None, EngineRequest("r", [1], SamplingParams())) is None
