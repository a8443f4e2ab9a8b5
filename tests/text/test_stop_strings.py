"""Stop strings over streamed text: what is shown ends before the first stop, however tokens cut text and characters."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.sampling.stop import StopMatcher
from headway.text import IncrementalDetokenizer, Tokenizer
from tests.server.scorecard import record

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # three people joined to one picture
ATOMS = [
    "a",
    "b",
    "ab",
    " ",
    "\n",
    "the train",
    "e\u0301",
    "é",
    "数",
    "😀",
    "\u200d",
    "\ufeff",
    "<s>",
    FAMILY,
]
PARTS = st.sampled_from(ATOMS) | st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")
TEXTS = st.lists(PARTS, max_size=20).map("".join)
KINDS = ["byte_level", "byte_fallback", "metaspace"]


@dataclass(frozen=True)
class Case:
    """Token ids of a prompt and an output, and stop strings, some of them from the output's text."""

    prompt: list[int]
    output: list[int]
    stops: list[str]


def any_ids(tokenizer: Tokenizer) -> list[int]:
    """But for byte tokens: where a run of them is no UTF-8, their decoder takes back characters that it began with."""
    return [i for i in range(tokenizer.vocab_size) if not (tokenizer.id_to_token(i) or "").startswith("<0x")]


@st.composite
def cases(draw: st.DrawFn, tokenizer: Tokenizer) -> Case:
    ids = tokenizer.encode(draw(TEXTS), add_special_tokens=False)
    if draw(st.booleans()):  # tokens that no tokenizer would choose: characters in pieces
        ids = [i for n in ids for i in tokenizer.encode_literally(tokenizer.decode([n]) or "é")]
    if draw(st.booleans()):
        ids += draw(st.lists(st.sampled_from(any_ids(tokenizer)), max_size=8))
    text = tokenizer.decode(ids)
    stops = draw(st.lists(TEXTS.filter(bool), max_size=2))
    for _ in range(draw(st.integers(0, 3)) if text else 0):
        start = draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + draw(st.integers(1, 9))])
    return Case([], ids, stops or ["zzz" * 40])


def check(tokenizer: Tokenizer, case: Case, *, is_included: bool) -> None:
    """Token by token, beside the same decided on the whole text so far."""
    detokenizer = IncrementalDetokenizer(tokenizer, case.prompt)
    matcher = StopMatcher(case.stops, is_included=is_included)
    longest = max(map(len, case.stops))
    shown = full = ""
    for token_id in [*case.output, None]:
        piece = detokenizer.finish() if token_id is None else detokenizer.append(token_id)
        full += piece
        shown += matcher.push(piece)
        starts = [(full.find(stop), len(stop)) for stop in case.stops if stop in full]
        if starts:
            start, length = min(starts)
            assert shown == full[: start + length if is_included else start]
            assert matcher.matched == full[start : start + length]
            return
        assert matcher.matched is None
        assert full.startswith(shown)
        assert len(full) - len(shown) < longest
    assert shown + matcher.flush() == full == tokenizer.decode(case.output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_examples", [100, pytest.param(20_000, marks=pytest.mark.long)])
def test_text_ends_before_its_stop(request: pytest.FixtureRequest, kind: str, num_examples: int) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)

    @settings(max_examples=num_examples)
    @given(case=cases(tokenizer), is_included=st.booleans())
    def run(case: Case, is_included: bool) -> None:
        check(tokenizer, case, is_included=is_included)

    run()
    if num_examples > 1000:
        record(f"H6 text, {kind.replace('_', ' ')}", num_examples=num_examples)


class LeakyMatcher(StopMatcher):
    """Lets out what may yet become a stop string."""

    def _num_held(self, text: str) -> int:
        return 0


def test_a_matcher_that_holds_nothing_back_is_found(
    byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.text.test_stop_strings.StopMatcher", LeakyMatcher)
    output = byte_level.encode("a train at é", add_special_tokens=False)
    with pytest.raises(AssertionError):
        check(byte_level, Case([], output, ["ain at"]), is_included=False)
