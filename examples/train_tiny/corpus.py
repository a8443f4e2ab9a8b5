"""Chooses, splits and packs the training text: the running interpreter's standard library. Knows no model.

A file's split follows from a hash of its relative path, so every machine with the same Python draws the same lines.
Held-out files are used for nothing but the final evaluation; dev files steer the training.
"""

from __future__ import annotations

import ast
import hashlib
import json
import lzma
import platform
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from examples.train_tiny.settings import BOS, EOS, TURN_END, TURN_START
from examples.train_tiny.tokenizer import save_tokenizer, train_tokenizer

Split = Literal["train", "dev", "heldout"]

HELDOUT_PER_MILLE, DEV_PER_MILLE = 40, 12
MAX_FILE_BYTES, MAX_LINE_CHARS = 400_000, 1_000
MAX_DATA_SHARE = 0.22  # digits and backslashes among a file's characters: tables, escaped blobs
SHINGLE_LINES, MAX_SEEN_SHARE = 5, 0.4  # near-duplicates: share of 5-line runs already seen in a larger file
EXCLUDED_PREFIXES = ("site-packages/", "encodings/", "pydoc_data/", "lib2to3/tests/data/", "ensurepip/_bundled/",
                     "test/test_json/", "test/encoded_modules/", "_sysconfigdata")  # fmt: skip


@dataclass(frozen=True)
class SourceFile:
    path: str  # relative to the standard library's folder
    split: Split
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Document:
    file: SourceFile
    text: str


def split_of(path: str) -> Split:
    """The split a file belongs to, from its relative path alone."""
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 1000
    if bucket < HELDOUT_PER_MILLE:
        return "heldout"
    return "dev" if bucket < HELDOUT_PER_MILLE + DEV_PER_MILLE else "train"


def read_standard_library() -> list[Document]:
    """Every usable .py file of the running interpreter, sorted by path, near-duplicates dropped."""
    root = Path(sysconfig.get_paths()["stdlib"])
    candidates = [_read(root, path) for path in sorted(root.rglob("*.py"))]
    by_size = sorted((d for d in candidates if d), key=lambda d: (-d.file.num_bytes, d.file.path))
    return sorted(_drop_near_duplicates(by_size), key=lambda d: d.file.path)


def _read(root: Path, path: Path) -> Document | None:
    relative = path.relative_to(root).as_posix()
    if relative.startswith(EXCLUDED_PREFIXES) or not 200 <= path.stat().st_size <= MAX_FILE_BYTES:
        return None
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    data_share = sum(text.count(c) for c in "0123456789\\") / len(text)
    if data_share > MAX_DATA_SHARE or max(map(len, text.splitlines())) > MAX_LINE_CHARS:
        return None
    digest = hashlib.sha256(raw).hexdigest()
    return Document(SourceFile(relative, split_of(relative), len(raw), digest), text)


def _drop_near_duplicates(documents: Sequence[Document]) -> Iterator[Document]:
    seen: set[int] = set()
    for document in documents:
        lines = [line.strip() for line in document.text.splitlines() if line.strip()]
        shingles = {hash(tuple(lines[i : i + SHINGLE_LINES])) for i in range(len(lines) - SHINGLE_LINES + 1)}
        if shingles and len(shingles & seen) <= MAX_SEEN_SHARE * len(shingles):
            yield document
        seen |= shingles


def dialogues(documents: Sequence[Document]) -> Iterator[str]:
    """Short exchanges for the chat markers: a function's docstring summary asks, the function's source answers."""
    for document in documents:
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)):
                continue
            source = ast.get_source_segment(document.text, node)
            if source and 120 <= len(source) <= 1200 and node.col_offset == 0:
                ask = doc.splitlines()[0]
                yield f"{TURN_START}user\n{ask}{TURN_END}\n{TURN_START}assistant\n{source}{TURN_END}\n"


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Documents as one stream: bos, text, eos for each."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([bos, *e.ids, eos], dtype=np.uint16) for e in encodings])


def _check_lossless(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise ValueError("the tokenizer does not reproduce its input")


def _xz_bits_per_byte(documents: Sequence[Document]) -> dict[str, float]:
    """What `xz -9` needs for the same bytes: all files as one stream, and file by file."""
    blobs = [d.text.encode() for d in documents]
    num_bytes = sum(map(len, blobs))
    stream = len(lzma.compress(b"".join(blobs), preset=9))
    extreme = len(lzma.compress(b"".join(blobs), preset=9 | lzma.PRESET_EXTREME))
    alone = sum(len(lzma.compress(blob, preset=9)) for blob in blobs)
    return {name: 8 * size / num_bytes for name, size in
            (("one_stream", stream), ("one_stream_extreme", extreme), ("file_by_file", alone))}  # fmt: skip


def prepare(folder: Path) -> dict[str, object]:
    """Write tokenizer, packed tokens, held-out text and manifest into `folder`; return the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = read_standard_library()
    parts = {s: [d for d in documents if d.file.split == s] for s in ("train", "dev", "heldout")}
    tokenizer = train_tokenizer([d.text for d in parts["train"]])
    _check_lossless(tokenizer, [d.text for d in parts["heldout"]])
    chats = list(dialogues(parts["train"]))
    streams = {s: _encode(tokenizer, [d.text for d in docs]) for s, docs in parts.items()}
    streams["dialogues"] = _encode(tokenizer, chats)
    for name, stream in streams.items():
        stream.astype("<u2").tofile(folder / f"{name}.u16")
    save_tokenizer(tokenizer, folder)
    manifest: dict[str, object] = {
        "python": platform.python_version(),
        "num_tokens": {name: int(stream.size) for name, stream in streams.items()},
        "num_bytes": {s: sum(d.file.num_bytes for d in docs) for s, docs in parts.items()},
        "num_files": {s: len(docs) for s, docs in parts.items()},
        "num_dialogues": len(chats),
        "xz_bits_per_byte": _xz_bits_per_byte(parts["heldout"]),
        "files": [asdict(d.file) for d in documents],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    summary = {k: v for k, v in manifest.items() if k != "files"}
    print(json.dumps(summary, indent=1), file=sys.stderr)
    return manifest
