"""Writes the model card of a trained checkpoint from its metrics.json, with freshly drawn samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from examples.train_tiny.checkpoint import load_checkpoint
from examples.train_tiny.model import TinyModel
from examples.train_tiny.settings import EOS, TURN_END, TURN_START, TinyShape

PROMPTS = (
    "def read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "import unittest\n\n\nclass TestQueue(unittest.TestCase):\n",
    f"{TURN_START}user\nReturn the absolute path of a file.{TURN_END}\n{TURN_START}assistant\n",
)
SAMPLE_TOKENS, TEMPERATURE, TOP_P, SEED = 120, 0.7, 0.9, 1

TEMPLATE = Path(__file__).with_name("card_template.md")


@torch.no_grad()
def sample(model: TinyModel, tokenizer: Tokenizer, prompt: str) -> str:
    """Prompt and continuation; recomputes the whole sequence for each token, which is fine at this size."""
    generator = torch.Generator().manual_seed(SEED)
    ids: list[int] = tokenizer.encode(prompt).ids
    ends = {tokenizer.token_to_id(t) for t in (EOS, TURN_END)}
    for _ in range(SAMPLE_TOKENS):
        probs, order = (
            (model.logits(torch.tensor([ids]))[0, -1] / TEMPERATURE).softmax(-1).sort(descending=True)
        )
        kept = torch.where(probs.cumsum(-1) - probs < TOP_P, probs, 0.0)
        token = int(order[torch.multinomial(kept, 1, generator=generator)])
        if token in ends:
            break
        ids.append(token)
    text: str = tokenizer.decode(ids[1:], skip_special_tokens=False)
    return text


def _bits_table(metrics: dict[str, Any]) -> str:
    xz = metrics["corpus"]["xz_bits_per_byte"]
    rows = [(f"this model, context {c}", bits) for c, bits in metrics["heldout_bits_per_byte"].items()]
    rows += [("`xz -9`, one stream", xz["one_stream"]), ("`xz -9e`, one stream", xz["one_stream_extreme"])]
    rows += [("`xz -9`, file by file", xz["file_by_file"])]
    return "\n".join(f"| {name} | {bits:.3f} |" for name, bits in rows)


def render(metrics: dict[str, Any], shape: TinyShape, file_bytes: int, samples: list[str]) -> str:
    corpus = metrics["corpus"]
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
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "seed": SEED,
        "samples": "\n\n".join(f"```python\n{text.rstrip()}\n```" for text in samples),
    }
    return TEMPLATE.read_text(encoding="utf-8").format(**fields)


def write_card(folder: Path) -> None:
    """README.md beside the checkpoint in `folder`."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    shape = TinyShape()
    model = load_checkpoint(folder, shape)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    samples = [sample(model, tokenizer, prompt) for prompt in PROMPTS]
    file_bytes = (folder / "model.safetensors").stat().st_size
    (folder / "README.md").write_text(render(metrics, shape, file_bytes, samples), encoding="utf-8")
