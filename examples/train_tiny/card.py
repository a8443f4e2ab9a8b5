"""Writes the model card of a trained checkpoint from its metrics.json, with freshly drawn samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.train_tiny.checkpoint import load_checkpoint
from examples.train_tiny.model import TinyModel
from examples.train_tiny.settings import EOS, TURN_END, TURN_START, TinyShape

# None ends on a line break but the chat's: a break and the indentation after it are one token, so a break at the end of
# a prompt says that the next line is not indented.
PROMPTS = (
    "def read_lines(path):",
    "class Stack:\n    def __init__(self):",
    "import unittest\n\n\nclass TestQueue(unittest.TestCase):",
    f"{TURN_START}user\nReturn the absolute path of a file.{TURN_END}\n{TURN_START}assistant\n",
)
SAMPLE_TOKENS, SEED = 120, 1
OVERLAP_FIELDS = ("unseen_files", "unseen_bits_per_byte", "sibling_files", "no_sibling_bits_per_byte")

TEMPLATE = Path(__file__).with_name("card_template.md")


@torch.no_grad()
def sample(model: TinyModel, tokenizer: Tokenizer, prompt: str, generation: dict[str, Any]) -> str:
    """Prompt and continuation with the checkpoint's own sampling settings."""
    generator = torch.Generator().manual_seed(SEED)
    ids: list[int] = tokenizer.encode(prompt).ids
    ends = {tokenizer.token_to_id(t) for t in (EOS, TURN_END)}
    for _ in range(SAMPLE_TOKENS):
        logits = _penalised(model.logits(torch.tensor([ids]))[0, -1], ids, generation["repetition_penalty"])
        probs, order = (logits / generation["temperature"]).softmax(-1).sort(descending=True)
        kept = torch.where(probs.cumsum(-1) - probs < generation["top_p"], probs, 0.0)
        token = int(order[torch.multinomial(kept, 1, generator=generator)])
        if token in ends:
            break
        ids.append(token)
    text: str = tokenizer.decode(ids[1:], skip_special_tokens=False)
    return text


def _penalised(logits: Tensor, ids: list[int], penalty: float) -> Tensor:
    """Logits [V] of the tokens seen so far moved down: divided by the penalty above zero, multiplied below."""
    seen = torch.tensor(sorted(set(ids)))
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def _bits_table(metrics: dict[str, Any]) -> str:
    xz = metrics["corpus"]["xz_bits_per_byte"]
    rows = [(f"this model, context {c}", bits) for c, bits in metrics["heldout_bits_per_byte"].items()]
    rows += [("`xz -9`, one stream", xz["one_stream"]), ("`xz -9e`, one stream", xz["one_stream_extreme"])]
    rows += [("`xz -9`, file by file", xz["file_by_file"])]
    rows += [("`xz -9e`, the training files first", metrics["overlap"]["primed_xz_bits_per_byte"])]
    return "\n".join(f"| {name} | {bits:.3f} |" for name, bits in rows)


def render(
    metrics: dict[str, Any], generation: dict[str, Any], shape: TinyShape, file_bytes: int, samples: list[str]
) -> str:
    if "overlap" not in metrics:
        raise ValueError("metrics.json has no overlap: run `python -m examples.train_tiny overlap` first")
    corpus, overlap = metrics["corpus"], metrics["overlap"]
    fields = {
        **vars(shape),
        **{k: metrics[k] for k in ("steps", "epochs", "train_seconds", "hardware", "torch")},
        "num_parameters": metrics["num_parameters"] / 1e6,
        "num_parameters_mtp": metrics["num_parameters_mtp"] / 1e6,
        "tokens_m": metrics["tokens_seen"] / 1e6,
        "file_mb": file_bytes / 1e6,
        **{f"{split}_files": n for split, n in corpus["num_files"].items()},
        **{f"{split}_mb": n / 1e6 for split, n in corpus["num_bytes"].items()},
        **{k: corpus[k] for k in ("python", "num_dialogues")},
        **{k: metrics["settings"][k] for k in ("context", "dropout")},
        "table": _bits_table(metrics),
        **{f"seen_{n}": 100 * share for n, share in overlap["seen_window_share"].items()},
        **{k: overlap[k] for k in OVERLAP_FIELDS},
        "unseen_mb": overlap["unseen_bytes"] / 1e6,
        **{k: generation[k] for k in ("temperature", "top_p", "repetition_penalty")},
        "seed": SEED,
        "samples": "\n\n".join(f"```python\n{text.rstrip()}\n```" for text in samples),
    }
    return TEMPLATE.read_text(encoding="utf-8").format(**fields)


def write_card(folder: Path) -> None:
    """README.md beside the checkpoint in `folder`."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    shape = TinyShape()
    model = load_checkpoint(folder, shape)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    samples = [sample(model, tokenizer, prompt, generation) for prompt in PROMPTS]
    file_bytes = (folder / "model.safetensors").stat().st_size
    text = render(metrics, generation, shape, file_bytes, samples)
    (folder / "README.md").write_text(text, encoding="utf-8")
