from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from headway.errors import ModelLoadError, RequestError
from headway.text import Tokenizer
from headway.text.tokenizer import LONG_TEXT_CHARS


@given(text=st.text())
def test_text_survives_the_round_trip(byte_level: Tokenizer, text: str) -> None:
    if "two words" in text or "ÿÿ" in text:
        return
    ids = byte_level.encode(text, add_special_tokens=False)
    assert byte_level.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < byte_level.vocab_size for i in ids)


def test_bos_is_added_where_the_post_processor_says_so(byte_level: Tokenizer, metaspace: Tokenizer) -> None:
    assert byte_level.encode("train")[0] == byte_level.bos_token_id
    assert byte_level.encode("train", add_special_tokens=False) == byte_level.encode("train")[1:]
    assert metaspace.encode("train")[0] != metaspace.bos_token_id


def test_special_tokens_are_skipped_on_request(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("train</s>")
    assert byte_level.decode(ids) == "train"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<s>train</s>"
    assert byte_level.eos_token_id in byte_level.special_ids


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "special": True}])
def test_special_tokens_come_from_the_configuration(tokenizer_dir: Path, eos: object) -> None:
    (tokenizer_dir / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "bos_token": None}))
    tokenizer = Tokenizer.from_dir(tokenizer_dir)
    assert tokenizer.eos_token_id == 1
    assert tokenizer.bos_token_id is None


def test_special_tokens_map_is_read_too(tokenizer_dir: Path) -> None:
    (tokenizer_dir / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert Tokenizer.from_dir(tokenizer_dir).eos_token_id == 1


def test_truncation_saved_with_the_tokenizer_is_switched_off(tokenizer_dir: Path) -> None:
    backend = Backend.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=64)
    backend.save(str(tokenizer_dir / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(tokenizer_dir)
    text = "a long line of words and one more"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_without_a_token_decode_to_nothing(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("train", add_special_tokens=False)
    assert byte_level.decode([*ids, byte_level.vocab_size + 7]) == "train"
    assert byte_level.token_bytes(byte_level.vocab_size + 7) == b""


def test_a_missing_file_is_named_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json .*save_pretrained"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("content", [b"{}", b"[1, 2", b"\xff\xfe", b"null"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000])
def test_a_broken_configuration_is_named(tokenizer_dir: Path, content: str) -> None:
    (tokenizer_dir / "tokenizer_config.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json"):
        Tokenizer.from_dir(tokenizer_dir)


@pytest.mark.parametrize("piece", ["naïve café 😀 ", "<s>two words</s>", "a"])
def test_a_long_text_is_as_many_short_ones(byte_level: Tokenizer, piece: str) -> None:
    """Another call of the library serves it. The pieces end where no token goes on."""
    text = piece * (2 * LONG_TEXT_CHARS // len(piece))
    token_ids = byte_level.encode(text)
    backend = Backend.from_str(byte_level.to_json())
    assert token_ids == backend.encode(text).ids
    assert byte_level.decode(token_ids, skip_special_tokens=False) == "<s>" + text
    assert byte_level.decode(token_ids) == backend.decode(token_ids)
    assert byte_level.encode_literally(text)[:8] == byte_level.encode_literally(piece * 20)[:8]


def test_others_run_while_a_long_text_is_read(byte_level: Tokenizer) -> None:
    """A server answers on another thread meanwhile: with the interpreter kept, not one turn would be taken."""
    text, num_turns = "the next train leaves " * 20_000, 0
    with ThreadPoolExecutor(1) as pool:
        pool.submit(byte_level.encode, "x" * LONG_TEXT_CHARS).result()
        reading = pool.submit(byte_level.encode, text)
        while not reading.done():
            time.sleep(1e-4)
            num_turns += 1
    assert num_turns > 10
    assert byte_level.decode(reading.result()) == text


@pytest.mark.parametrize("length", [1, LONG_TEXT_CHARS])
def test_bad_text_and_ids_are_the_callers_error(byte_level: Tokenizer, length: int) -> None:
    with pytest.raises(RequestError, match="text must be"):
        byte_level.encode("lone \ud800 surrogate" * length)
    with pytest.raises(RequestError, match="token_ids must be"):
        byte_level.decode([5] * length + [-1])
    with pytest.raises(RequestError, match="token_ids must be"):
        byte_level.decode([-1])
