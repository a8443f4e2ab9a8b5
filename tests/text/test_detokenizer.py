"""The law: the pieces joined are what decoding prompt and output adds to the decoded prompt."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from headway.text import IncrementalDetokenizer, Tokenizer

KINDS = ["byte_level", "byte_fallback", "metaspace"]


@pytest.fixture(scope="session", params=KINDS)
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


def pieces_of(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [*(detokenizer.append(i) for i in output), detokenizer.finish()]


def added_text(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool = True) -> str:
    whole = tokenizer.decode(prompt + output, skip_special_tokens=skip)
    return whole[len(tokenizer.decode(prompt, skip_special_tokens=skip)) :]


@given(text=st.text(), cut=st.integers(0, 40))
def test_any_text_streams_to_itself(any_tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = any_tokenizer.encode(text.replace("\ufffd", ""), add_special_tokens=False)
    prompt, output = ids[:cut], ids[cut:]
    if "\ufffd" in any_tokenizer.decode(prompt):  # a prompt cut within a character: see the byte-level test
        prompt, output = [], ids
    pieces = pieces_of(any_tokenizer, prompt, output)
    assert "".join(pieces) == added_text(any_tokenizer, prompt, output)
    assert not any("\ufffd" in piece for piece in pieces)


@given(data=st.data(), skip=st.booleans())
def test_any_byte_level_ids_stream_to_their_decode(
    byte_level: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    """Random ids: cut and invalid characters, special tokens, ids without a token."""
    ids = st.lists(st.integers(0, byte_level.vocab_size + 2), max_size=24)
    prompt, output = data.draw(ids), data.draw(ids)
    pieces = pieces_of(byte_level, prompt, output, skip)
    assert "".join(pieces) == added_text(byte_level, prompt, output, skip)


@given(data=st.data())
def test_any_metaspace_ids_stream_to_their_decode(metaspace: Tokenizer, data: st.DataObject) -> None:
    ids = st.lists(st.integers(0, metaspace.vocab_size - 1), max_size=24)
    prompt, output = data.draw(ids), data.draw(ids)
    assert "".join(pieces_of(metaspace, prompt, output)) == added_text(metaspace, prompt, output)


@given(data=st.data(), is_spaced=st.booleans(), skip=st.booleans())
def test_many_at_once_are_the_same_text(
    any_tokenizer: Tokenizer, data: st.DataObject, is_spaced: bool, skip: bool
) -> None:
    ids = st.lists(st.integers(0, any_tokenizer.vocab_size + 2), max_size=24)
    prompt, output, cut = data.draw(ids), data.draw(ids), data.draw(st.integers(0, 24))
    one, many = (
        IncrementalDetokenizer(any_tokenizer, prompt, skip, spaces_between_special_tokens=is_spaced)
        for _ in range(2)
    )
    for part in (output[:cut], output[cut:]):
        assert many.extend(part) == "".join(map(one.append, part))
    assert many.finish() == one.finish()


def test_every_prefix_of_the_stream_is_a_prefix_of_the_text(any_tokenizer: Tokenizer) -> None:
    text = "the train, a 😀😃 at é数は"
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    whole = any_tokenizer.decode(ids)
    seen = ""
    for piece in pieces_of(any_tokenizer, [], ids):
        seen += piece
        assert whole.startswith(seen)
    assert seen == whole


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_split_character_appears_with_its_last_byte(request: pytest.FixtureRequest, kind: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = [_byte_id(tokenizer, byte) for byte in "😀é".encode()]
    assert pieces_of(tokenizer, [], ids) == ["", "", "", "😀", "", "é", ""]
    assert pieces_of(tokenizer, ids[:4], ids[4:]) == ["", "é", ""]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_cut_short_is_shown_at_the_end_only(request: pytest.FixtureRequest, kind: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = [_byte_id(tokenizer, byte) for byte in "😀".encode()[:3]]
    assert pieces_of(tokenizer, [], ids) == ["", "", "", tokenizer.decode(ids)]


def test_bytes_that_never_become_a_character_do_not_hold_the_stream(byte_fallback: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_fallback)
    pieces = [detokenizer.append(_byte_id(byte_fallback, 0xFF)) for _ in range(100)]
    assert len("".join(pieces)) >= 90
    (word,) = [i for i in range(byte_fallback.vocab_size) if byte_fallback.id_to_token(i) == "▁train"]
    assert detokenizer.append(word).endswith(" train")


def test_skipped_tokens_leave_no_trace_in_a_long_output(any_tokenizer: Tokenizer) -> None:
    eos = any_tokenizer.eos_token_id
    assert eos is not None
    words = any_tokenizer.encode("the train", add_special_tokens=False)
    output = [eos] * 500 + words + [eos] * 500
    assert "".join(pieces_of(any_tokenizer, [], output)) == any_tokenizer.decode(words)


def test_work_per_token_does_not_grow(metaspace: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window stays short however long the output, whatever it is made of."""
    longest = 0
    decode = metaspace.decode

    def watched(token_ids: list[int], skip_special_tokens: bool = True) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode(token_ids, skip_special_tokens)

    monkeypatch.setattr(metaspace, "decode", watched)
    ids = metaspace.encode("the next train leaves " * 200)
    pieces_of(metaspace, [], ids)
    assert longest <= 12


def _byte_id(tokenizer: Tokenizer, byte: int) -> int:
    """The id of the token that is this one byte."""
    if tokenizer.is_byte_level:
        return next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([byte]))
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.id_to_token(i) == f"<0x{byte:02X}>")


def test_special_tokens_side_by_side_may_be_joined() -> None:
    """A WordPiece decoder puts a space between any two tokens."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    )
    backend.add_special_tokens(["<x>", "<y>"])
    backend.decoder = tokenizers.decoders.WordPiece()
    tokenizer = Tokenizer(backend)
    x, y = backend.token_to_id("<x>"), backend.token_to_id("<y>")

    def text(is_spaced: bool) -> str:
        detokenizer = IncrementalDetokenizer(
            tokenizer, [1], skip_special_tokens=False, spaces_between_special_tokens=is_spaced
        )
        return "".join([*(detokenizer.append(i) for i in (x, y, 1, x, 2)), detokenizer.finish()])

    assert text(True) == " <x> <y> a <x> b"
    assert text(False) == " <x><y> a <x> b"
