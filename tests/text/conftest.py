"""Tokenizers trained on the spot: one of each kind of decoder that the detokeniser treats differently."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from headway.text import Tokenizer

CORPUS = [
    "The next train leaves when the line ahead is clear.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 😀😃 naïve café",
    "数は力である。列車の間隔を保つ。 Привет, мир! مرحبا",
    "def step(self):\n    plan = self.ledger.plan()\n    return plan\n",
] * 8
SPECIAL = ["<s>", "</s>", "<|user|>"]


def byte_level_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["two words", "ÿÿ"])  # added tokens outside the byte-level spelling
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def byte_fallback_backend() -> tokenizers.Tokenizer:
    """SentencePiece style, as Llama 2: words marked with U+2581, unknown characters spelled in byte tokens."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁train", "a", "e", "t", "é", "s", ",", "▁a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(SPECIAL)
    return backend


def metaspace_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_backend(), {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    return Tokenizer(byte_fallback_backend(), {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="session")
def metaspace() -> Tokenizer:
    return Tokenizer(metaspace_backend(), {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    byte_level_backend().save(str(tmp_path / "tokenizer.json"))
    return tmp_path
