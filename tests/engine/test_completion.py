"""Text of a completion: stop strings across token borders, what is held back, what a stop token leaves out."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence

import pytest

from headway.engine.completion import Completion, Request
from headway.errors import RequestError
from headway.request import SamplingParams
from headway.sampling.stop import StopMatcher


class LetterDetokenizer:
    """Token i is the i-th piece of a list; a None piece is half a character, shown with the next token."""

    def __init__(self, pieces: list[str | None]) -> None:
        self._pieces = pieces
        self._num_held = 0

    def append(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if piece is None:
            self._num_held += 1
            return ""
        self._num_held = 0
        return piece

    def extend(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.append, token_ids))

    def finish(self) -> str:
        return "\ufffd" if self._num_held else ""


def completion_of(pieces: list[str | None], **params: object) -> Completion:
    request = Request("0", 0, None, [0], SamplingParams(**params), 0.0)
    completion = Completion(request, 0, LetterDetokenizer(pieces))
    request.completions.append(completion)
    return completion


def feed(completion: Completion, num_tokens: int) -> tuple[list[str], str | None]:
    """Appends tokens 0, 1, ... until a stop string appears; returns the streamed texts and that string."""
    texts = []
    for token in range(num_tokens):
        matched = completion.append(token, 1.0)
        if matched is not None:
            completion.end("stop", matched, 2.0)
        if delta := completion.take_delta():
            texts.append(delta.text)
        if matched is not None:
            return texts, matched
    return texts, None


@pytest.mark.parametrize(
    ("pieces", "stop", "text"),
    [
        (["ab", "cd", "ef"], "cd", "ab"),
        (["ab", "cd", "ef"], "bc", "a"),
        (["ab", "cd", "ef"], "abcdef", ""),
        (["a", "ab", "ac"], "aac", None),
        (["a", "a", "b", "c"], "ab", "a"),
        (["xEN", "D", "y"], "END", "x"),
        (["x", "", "END"], "END", "x"),
    ],
)
@pytest.mark.parametrize("is_included", [False, True])
def test_stop_strings_cross_token_borders(
    pieces: list[str], stop: str, text: str | None, is_included: bool
) -> None:
    completion = completion_of(list(pieces), stop=stop, include_stop_str_in_output=is_included)
    texts, matched = feed(completion, len(pieces))
    if text is None:
        assert matched is None
        return
    expected = text + stop if is_included else text
    assert matched == stop
    assert "".join(texts) == expected == completion.output().text


def test_every_split_of_a_text_stops_at_the_same_place() -> None:
    text = "aabaabXbaab"
    for cuts in itertools.combinations(range(1, len(text)), 3):
        bounds = [0, *cuts, len(text)]
        matcher = StopMatcher(["abX", "baabX"], is_included=False)
        shown = "".join(matcher.push(text[a:b]) for a, b in itertools.pairwise(bounds))
        assert (shown, matcher.matched) == ("aa", "baabX")


def test_nothing_that_may_become_a_stop_is_shown() -> None:
    matcher = StopMatcher(["STOP"], is_included=False)
    assert [matcher.push(piece) for piece in ("a S", "TO", "x ST")] == ["a ", "", "STOx "]
    assert matcher.flush() == "ST"
    assert matcher.flush() == ""


def test_held_text_comes_out_at_the_end() -> None:
    completion = completion_of(["hello S", "TO"], stop="STOP")
    texts, _ = feed(completion, 2)
    completion.end("length", None, 2.0)
    final = completion.take_delta()
    assert texts == ["hello "]
    assert final is not None
    assert final.text == "STO"
    assert completion.output().text == "hello STO"


def test_min_tokens_shields_text_from_stop_strings() -> None:
    completion = completion_of(["END", "a", "END", "b"], stop="END", min_tokens=2)
    texts, matched = feed(completion, 4)
    assert matched == "END"
    assert "".join(texts) == "ENDa"
    assert len(completion.token_ids) == 3


@pytest.mark.parametrize("stop", [None, "ZZ"])
@pytest.mark.parametrize("is_included", [False, True])
def test_a_stop_token_is_in_the_tokens_but_not_in_the_text(stop: str | None, is_included: bool) -> None:
    completion = completion_of(["a", "b", "."], stop=stop, include_stop_str_in_output=is_included)
    completion.append(0, 1.0)
    completion.append(1, 1.0)
    completion.append(2, 1.0, is_stop_token=True)
    completion.end("stop", 2, 2.0)
    output = completion.output()
    assert output.token_ids == [0, 1, 2]
    assert output.text == ("ab." if is_included else "ab")


def test_deltas_join_to_the_output_and_wait_for_whole_characters() -> None:
    pieces: list[str | None] = ["a", None, None, "é", "b", None]
    completion = completion_of(pieces)
    deltas = []
    for token in range(len(pieces)):
        completion.append(token, float(token))
        if token == len(pieces) - 1:
            completion.end("length", None, 9.0)
        deltas.append(completion.take_delta())
    shown = [delta for delta in deltas if delta is not None]
    assert [delta.text for delta in shown] == ["a", "é", "b", "\ufffd"]
    assert functools.reduce(operator.iadd, (delta.token_ids for delta in shown), []) == completion.token_ids
    assert shown[-1].finish_reason == "length"
    assert shown[-1].metrics is not None
    assert "".join(delta.text for delta in shown) == completion.output().text


def test_without_detokenizer_every_token_is_a_delta() -> None:
    request = Request("0", 0, None, [0], SamplingParams(detokenize=False), 0.0)
    completion = Completion(request, 0, None)
    completion.append(5, 1.0)
    delta = completion.take_delta()
    assert delta is not None
    assert delta.token_ids == [5]
    assert delta.text == ""
    assert completion.take_delta() is None


def test_metrics() -> None:
    completion = completion_of(["a", "b", "c"])
    for token in range(3):
        completion.append(token, 1.0 + token)
    completion.end("length", None, 3.0)
    metrics = completion.request.metrics()
    assert (metrics.ttft_s, metrics.latency_s, metrics.tpot_s) == (1.0, 3.0, 1.0)
    assert (metrics.num_prompt_tokens, metrics.num_output_tokens) == (1, 3)


def test_tokens_alone_are_taken_where_a_plain_completion_without_text_goes_on() -> None:
    """Its first delta and its last have more to tell."""
    request = Request("0", 0, None, [0], SamplingParams(detokenize=False), 0.0)
    completion = Completion(request, 0, None)
    completion.append(7, 1.0)
    assert completion.take_tokens() == []
    first = completion.take_delta()
    assert first is not None
    assert first.token_ids == [7]
    assert completion.take_tokens() == []
    completion.append(8, 1.0)
    completion.append(9, 1.0)
    assert completion.take_tokens() == [8, 9]
    with pytest.raises(RequestError, match="num_positions"):
        completion.check_rewind(1)
    completion.append(10, 1.0, is_stop_token=True)
    completion.end("stop", None, 2.0)
    assert completion.take_tokens() == []
    last = completion.take_delta()
    assert last is not None
    assert (last.token_ids, last.finish_reason) == ([10], "stop")


@pytest.mark.parametrize(
    "params", [{"logprobs": 1}, {"stop": ["x"], "detokenize": True}, {"detokenize": True}]
)
def test_tokens_alone_are_not_taken_where_there_is_more_to_tell(params: dict[str, object]) -> None:
    completion = completion_of(["a", "b"], **params)
    completion.append(0, 1.0)
    assert completion.take_delta() is not None
    completion.append(1, 1.0)
    assert completion.take_tokens() == []
