"""One training run: packed corpus in, checkpoint and metrics out. The schedule follows wall time or epochs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.train_tiny.checkpoint import export_weights, load_weights, save_checkpoint
from examples.train_tiny.evaluate import bits_per_byte, stream_nats
from examples.train_tiny.model import Losses, TinyModel
from examples.train_tiny.optim import Optimisers
from examples.train_tiny.settings import TinyShape, TrainSettings

EVAL_RESERVE_SECONDS = 20.0  # of the wall budget, for the final evaluation and the export


@dataclass(frozen=True)
class Corpus:
    """Token streams on the device and the manifest that describes them."""

    train: Tensor
    dev: Tensor
    heldout: Tensor
    manifest: dict[str, object]

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Corpus:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))

        def stream(name: str) -> Tensor:
            return torch.from_numpy(np.fromfile(folder / f"{name}.u16", dtype="<u2").astype(np.int64)).to(
                device
            )

        train = torch.cat([stream("train"), stream("dialogues")])
        return cls(train, stream("dev"), stream("heldout"), manifest)

    def num_bytes(self, split: str) -> int:
        counts = self.manifest["num_bytes"]
        assert isinstance(counts, dict)
        return int(counts[split])


@dataclass
class Progress:
    """What the loop has done so far, and the best weights by the dev files."""

    step: int = 0
    num_tokens: int = 0
    dev_history: list[dict[str, float]] = field(default_factory=list)
    best_dev: float = math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)


def learning_rate_scale(step: int, fraction: float, warmup_steps: int) -> float:
    """Linear warm-up, a plateau, then a straight line to zero over the last 60 % of the run."""
    return min(1.0, (step + 1) / warmup_steps, max(0.0, (1 - fraction) / 0.6))


def _windows(train: Tensor, settings: TrainSettings, generator: torch.Generator) -> Tensor:
    """[batch, context + 2] windows at random offsets."""
    rows = max(1, settings.batch_tokens // settings.context)
    device = train.device
    starts = torch.randint(len(train) - settings.context - 1, (rows, 1), generator=generator, device=device)
    return train[starts + torch.arange(settings.context + 2, device=device)]


def _compiled(model: TinyModel, sample: Tensor) -> Callable[[Tensor], Losses]:
    """torch.compile where it works on this machine; the plain model, with one line saying why, where it does not."""
    try:
        compiled: Callable[[Tensor], Losses] = torch.compile(model, dynamic=False)
        with torch.autocast(sample.device.type, torch.bfloat16, enabled=sample.is_cuda):
            torch.autograd.backward(list(compiled(sample)))
        model.zero_grad(set_to_none=True)
    except Exception as error:  # a missing compiler surfaces as many types; training goes on without it
        print(f"torch.compile is not used: {type(error).__name__}: {str(error)[:200]}", flush=True)
        model.zero_grad(set_to_none=True)
        return model
    return compiled


class Trainer:
    def __init__(self, corpus: Corpus, settings: TrainSettings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        torch.set_float32_matmul_precision("high")
        self.started = time.monotonic()
        self.corpus, self.settings, self.device = corpus, settings, device
        self.model = TinyModel(TinyShape(), settings.dropout).to(device)
        self.optimisers = Optimisers.build(
            self.model, settings.muon_lr, settings.adam_lr, settings.weight_decay
        )
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        self.progress = Progress()
        self.forward: Callable[[Tensor], Losses] = self.model
        if settings.compile:
            self.forward = _compiled(self.model, _windows(corpus.train, settings, self.generator))

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def fraction(self) -> float:
        """How much of the run is over, by time or by epochs, whichever is further."""
        budget = max(1.0, self.settings.seconds - EVAL_RESERVE_SECONDS)
        epochs = self.progress.num_tokens / len(self.corpus.train)
        return max(self.seconds() / budget, epochs / self.settings.epochs)

    def run(self) -> None:
        """Train to the end of the budget; leaves the best weights by the dev files in the model."""
        while (fraction := self.fraction()) < 1.0:
            losses = self._step(fraction)
            if self.progress.step % self.settings.log_every == 0:
                self._log(losses, fraction)
            if self.progress.step % self.settings.dev_every == 0:
                self._judge()
        self._judge()
        load_weights(self.model, self.progress.best_weights)

    def _step(self, fraction: float) -> Losses:
        window = _windows(self.corpus.train, self.settings, self.generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses = self.forward(window)
            total = losses.next_token + self.settings.mtp_weight * losses.second_token
        torch.autograd.backward(total)
        self.optimisers.step(learning_rate_scale(self.progress.step, fraction, self.settings.warmup_steps))
        for router in self.model.routers():
            router.balance(self.settings.router_bias_step)
        self.progress.step += 1
        self.progress.num_tokens += window.shape[0] * self.settings.context
        return losses

    def _log(self, losses: Losses, fraction: float) -> None:
        rate = self.progress.num_tokens / self.seconds()
        print(
            f"step {self.progress.step:5d}  {100 * fraction:5.1f} %  loss {losses.next_token.item():.4f}"
            f"  second {losses.second_token.item():.4f}  {rate / 1e3:7.1f} k tokens/s  {self.seconds():6.1f} s",
            flush=True,
        )

    def _judge(self) -> None:
        """Bits per byte of the dev files; keeps a copy of the weights when it is the best so far."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            nats = stream_nats(self.model, self.corpus.dev, self.settings.context, self.settings.context)
        bits = bits_per_byte(nats, self.corpus.num_bytes("dev"))
        self.progress.dev_history.append({"step": self.progress.step, "bits_per_byte": round(bits, 4)})
        print(f"step {self.progress.step:5d}  dev {bits:.4f} bits/byte", flush=True)
        if not math.isfinite(bits):
            raise ValueError(f"training diverged: {bits} bits a byte at step {self.progress.step}")
        if bits < self.progress.best_dev:
            self.progress.best_dev = bits
            self.progress.best_weights = export_weights(self.model)


def _heldout_bits(model: TinyModel, corpus: Corpus, contexts: tuple[int, ...]) -> dict[str, float]:
    """Full float32 arithmetic on the exported, rounded weights; stride is half the context."""
    torch.set_float32_matmul_precision("highest")
    num_bytes = corpus.num_bytes("heldout")
    return {
        str(context): bits_per_byte(stream_nats(model, corpus.heldout, context, context // 2), num_bytes)
        for context in contexts
    }


def train(corpus_folder: Path, out: Path, settings: TrainSettings, device: torch.device) -> dict[str, object]:
    """Train, save the checkpoint under `out`, evaluate it on the held-out files, write and return the metrics."""
    corpus = Corpus.load(corpus_folder, device)
    trainer = Trainer(corpus, settings, device)
    trainer.run()
    train_seconds = trainer.seconds()
    save_checkpoint(trainer.model, corpus_folder, out)
    contexts = (settings.context // 4, settings.context // 2, settings.context, 2 * settings.context)
    metrics: dict[str, object] = {
        "num_parameters": sum(p.numel() for p in trainer.model.parameters()),
        "num_parameters_mtp": sum(p.numel() for p in trainer.model.mtp.parameters()),
        "tokens_seen": trainer.progress.num_tokens,
        "epochs": trainer.progress.num_tokens / len(corpus.train),
        "steps": trainer.progress.step,
        "train_seconds": train_seconds,
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "heldout_bits_per_byte": _heldout_bits(trainer.model, corpus, contexts),
        "router_load": [[round(v, 3) for v in r.load.tolist()] for r in trainer.model.routers()],
        "dev_history": trainer.progress.dev_history,
        "settings": asdict(settings),
        "corpus": {k: v for k, v in corpus.manifest.items() if k != "files"},
    }
    metrics["total_seconds"] = trainer.seconds()
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in metrics.items() if k != "dev_history"}, indent=1), flush=True)
    return metrics
