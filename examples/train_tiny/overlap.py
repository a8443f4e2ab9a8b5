"""How much of the held-out files the training files already say, and what the model scores where they say nothing.

Runs where the corpus was packed: it reads the sources again, and refuses sources that are not those of the manifest.
"""

from __future__ import annotations

import json
import lzma
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from examples.train_tiny.checkpoint import load_checkpoint
from examples.train_tiny.corpus import Document, read_standard_library
from examples.train_tiny.evaluate import bits_per_byte, token_nats
from examples.train_tiny.settings import SPECIAL_TOKENS, TinyShape

WINDOW_LINES = (5, 20)
RUN_WORDS, SIBLING_SHARE = 6, 0.2  # a sibling: one training file holds this share of a file's runs of words
XZ_DICTIONARY_BYTES = 64 << 20  # holds the whole corpus


def _line_windows(text: str, num_lines: int) -> Iterator[tuple[str, ...]]:
    """Runs of non-blank lines, indentation aside."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (tuple(lines[i : i + num_lines]) for i in range(len(lines) - num_lines + 1))


def seen_windows(train: Sequence[Document], heldout: Sequence[Document], num_lines: int) -> list[list[bool]]:
    """For each held-out file, which of its windows of `num_lines` lines occur in any training file."""
    known = {window for d in train for window in _line_windows(d.text, num_lines)}
    return [[window in known for window in _line_windows(d.text, num_lines)] for d in heldout]


def _word_runs(text: str) -> set[tuple[str, ...]]:
    """Runs of words and signs whatever the line breaks: renamed lines leave most of them, unlike line windows."""
    words = re.findall(r"\w+|[^\w\s]", text)
    return {tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1)}


def closest_shares(train: Sequence[Document], heldout: Sequence[Document]) -> list[float]:
    """For each held-out file, the largest share of its distinct word runs that a single training file holds."""
    runs = [_word_runs(d.text) for d in heldout]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    wanted = set().union(*runs)
    for idx, document in enumerate(train):
        for run in _word_runs(document.text) & wanted:
            holders[run].append(idx)
    counts = [Counter(idx for run in own for idx in holders.get(run, ())) for own in runs]
    return [max(c.values(), default=0) / max(1, len(own)) for c, own in zip(counts, runs, strict=True)]


def primed_xz_bits_per_byte(train: Sequence[Document], heldout: Sequence[Document]) -> float:
    """What the held-out files add to an xz stream that holds the training files first."""
    preset = 9 | lzma.PRESET_EXTREME
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": XZ_DICTIONARY_BYTES}]
    first, rest = (b"".join(d.text.encode() for d in docs) for docs in (train, heldout))
    sizes = [len(lzma.compress(b, lzma.FORMAT_RAW, filters=filters)) for b in (first, first + rest)]
    return 8 * (sizes[1] - sizes[0]) / len(rest)


def _split(corpus: Path) -> tuple[list[Document], list[Document]]:
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    documents = read_standard_library()
    if [d.file.sha256 for d in documents] != [f["sha256"] for f in manifest["files"]]:
        raise ValueError(f"the corpus in {corpus} was packed from another Python ({manifest['python']})")
    train, heldout = ([d for d in documents if d.file.split == s] for s in ("train", "heldout"))
    return train, heldout


def _file_nats(corpus: Path, model_folder: Path, context: int) -> list[float]:
    """Nats of each held-out file within the whole held-out stream, as the model card's table has it."""
    stream = torch.from_numpy(np.fromfile(corpus / "heldout.u16", dtype="<u2").astype(np.int64))
    model = load_checkpoint(model_folder, TinyShape())
    nats = token_nats(model, stream, context, context // 2, batch=1)
    starts = (stream == SPECIAL_TOKENS.index("<|bos|>")).nonzero().flatten()
    return [part.sum().item() for part in nats.tensor_split(starts)[1:]]


def measure_overlap(corpus: Path, model_folder: Path) -> None:
    """Add `overlap` to the metrics.json in `model_folder`."""
    train, heldout = _split(corpus)
    metrics = json.loads((model_folder / "metrics.json").read_text(encoding="utf-8"))
    seen = {n: seen_windows(train, heldout, n) for n in WINDOW_LINES}
    nats = _file_nats(corpus, model_folder, metrics["settings"]["context"])
    unseen = [i for i, hits in enumerate(seen[min(WINDOW_LINES)]) if not any(hits)]
    alone = [i for i, share in enumerate(closest_shares(train, heldout)) if share < SIBLING_SHARE]
    sizes = [d.file.num_bytes for d in heldout]

    def bits(chosen: Sequence[int]) -> float:
        return bits_per_byte(sum(nats[i] for i in chosen), sum(sizes[i] for i in chosen))

    metrics["overlap"] = {
        "seen_window_share": {str(n): sum(map(sum, s)) / sum(map(len, s)) for n, s in seen.items()},
        "unseen_files": len(unseen),
        "unseen_bytes": sum(sizes[i] for i in unseen),
        "unseen_bits_per_byte": bits(unseen),
        "sibling_files": len(heldout) - len(alone),
        "no_sibling_bits_per_byte": bits(alone),
        "primed_xz_bits_per_byte": primed_xz_bits_per_byte(train, heldout),
    }
    (model_folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(metrics["overlap"], indent=1))
