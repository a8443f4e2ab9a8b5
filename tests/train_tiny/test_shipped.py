"""The checkpoint in the package: its size, its configuration, and that it has learned to predict Python."""

from __future__ import annotations

import json
import lzma
import sysconfig
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from examples.train_tiny import checkpoint, corpus
from examples.train_tiny.evaluate import bits_per_byte, stream_nats
from examples.train_tiny.model import TinyModel
from examples.train_tiny.settings import BOS, EOS, TinyShape

MAX_PACKAGE_BYTES = 16 << 20
MAX_TEXT_BYTES, MAX_EACH_BYTES = 20_000, 8_000  # seconds of one CPU thread


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> TinyModel:
    return checkpoint.load_checkpoint(tiny_model_dir, TinyShape())


def _heldout_texts() -> list[str]:
    """Files of this Python that the training's rule by path holds out, within the limits above.

    In another Python than the one trained on, a file may have been trained on under another path.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    held = [
        p for p in sorted(root.rglob("*.py")) if corpus.split_of(p.relative_to(root).as_posix()) == "heldout"
    ]
    read = [d for d in (corpus._read(root, p) for p in held) if d and d.file.num_bytes <= MAX_EACH_BYTES]
    texts: list[str] = []
    for document in sorted(read, key=lambda d: d.file.sha256):
        if sum(map(len, texts)) + len(document.text) <= MAX_TEXT_BYTES:
            texts.append(document.text)
    return texts


def test_folder_is_small(tiny_model_dir: Path) -> None:
    assert sum(p.stat().st_size for p in tiny_model_dir.iterdir()) <= MAX_PACKAGE_BYTES


def test_configuration_is_what_the_exporter_writes(tiny_model_dir: Path) -> None:
    def shipped(name: str) -> object:
        return json.loads((tiny_model_dir / name).read_text(encoding="utf-8"))

    assert shipped("config.json") == checkpoint._config(TinyShape())
    assert shipped("generation_config.json") == checkpoint._generation_config()


def test_heldout_files_cost_less_than_xz(model: TinyModel, tokenizer: Tokenizer) -> None:
    texts = _heldout_texts()
    if not texts:
        pytest.skip("this Python's standard library has none of the held-out files as source")
    ids = corpus._encode(tokenizer, texts)
    stream = torch.from_numpy(ids.astype("int64"))
    blob = "".join(texts).encode()
    bits = bits_per_byte(stream_nats(model, stream, 1024, 512), len(blob))
    assert bits < 8 * len(lzma.compress(blob, preset=9)) / len(blob)


@pytest.mark.parametrize(
    "prompt", ["def fib(n):", "def read_lines(path):", "class Stack:\n    def __init__(self):"]
)
def test_indents_the_body_of_a_block(model: TinyModel, tokenizer: Tokenizer, prompt: str) -> None:
    """A line break and its indentation are one token, so this holds for prompts that end on visible text."""
    ids = tokenizer.encode(prompt).ids
    with torch.no_grad():
        token = int(model.logits(torch.tensor([ids]))[0, -1].argmax())
    indent = len(prompt.splitlines()[-1]) - len(prompt.splitlines()[-1].lstrip())
    assert tokenizer.decode([token]) == "\n" + " " * (indent + 4)


def test_prompt_starts_with_bos_and_text_survives(tokenizer: Tokenizer) -> None:
    text = "def f(x):\n\tif x:\r\n        return 'é\U0001f40d'\n\n\n  # \x00 end  \n"
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id(BOS)
    assert tokenizer.token_to_id(EOS) not in ids
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
