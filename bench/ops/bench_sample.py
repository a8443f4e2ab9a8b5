"""Times the sampler by vocabulary, batch and what the rows ask for.

usage: python -m bench.ops.bench_sample [--out FILE] [--only NAME ...]

The floor reads the logits once. The peer is torch: argmax for greedy rows, else softmax, sort,
cumulative sum and the exponential race for one token.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from bench.ops.command import run_alone
from bench.ops.report import Report
from bench.ops.timing import time_us
from headway import ops
from headway.ops.layout import ROW_SAMPLING

DEVICE = "cuda"
KV_LEN = 1024
CACHE_BYTES = 200e6
VOCABULARIES = (32768, 131072, 262144)
BATCHES = (1, 8, 64, 256)
KINDS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "top_k_top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "penalties": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
    "greedy_logprobs5": {"temperature": 0.0, "num_logprobs": 5},
}


def make_buffers(batch: int, vocab_size: int, settings: dict[str, float]) -> ops.StepBuffers:
    """Rows 1 .. batch with the same settings and KV_LEN random tokens of history."""
    buffers = ops.StepBuffers.allocate(
        max_rows=batch + 1,
        max_blocks_per_row=1,
        max_model_len=KV_LEN + 1,
        max_step_tokens=batch,
        max_logprobs=20,
        vocab_size=vocab_size,
        device=DEVICE,
    )
    sampling = np.zeros(batch + 1, ROW_SAMPLING)
    neutral = {"top_p": 1.0, "repetition_penalty": 1.0, "num_logprobs": -1, "max_total_len": 2 * KV_LEN}
    for field, value in (neutral | {"prompt_len": KV_LEN // 2} | settings).items():
        sampling[field] = value
    sampling["seed"] = np.arange(batch + 1)
    raw = torch.from_numpy(sampling.view(np.uint8).reshape(batch + 1, ROW_SAMPLING.itemsize))
    buffers.mirror.sampling.copy_(raw)
    buffers.mirror.history.random_(vocab_size)
    buffers.inputs.rows[:batch] = torch.arange(1, batch + 1, device=DEVICE)
    buffers.inputs.kv_lens.fill_(KV_LEN)
    return buffers


def torch_sample(logits: torch.Tensor, settings: dict[str, float]) -> torch.Tensor:
    if settings["temperature"] == 0:
        return logits.argmax(-1)
    probabilities = (logits / settings["temperature"]).softmax(-1)
    values, ids = probabilities.sort(-1, descending=True)
    dropped = values.cumsum(-1) - values > settings.get("top_p", 1.0)
    values = values.masked_fill(dropped, 0.0)
    if "top_k" in settings:
        values[:, int(settings["top_k"]) :] = 0.0
    drawn = (values / torch.empty_like(values).exponential_()).argmax(-1, keepdim=True)
    return ids.gather(-1, drawn)


def run(report: Report) -> None:
    for vocab_size in VOCABULARIES:
        for batch in BATCHES:
            if not report.wants_any([f"sample/{kind}/b{batch}/v{vocab_size}" for kind in KINDS]):
                continue
            num_bytes = 4.0 * batch * vocab_size
            copies = max(1, min(16, int(CACHE_BYTES / num_bytes)))
            logits = [2.5 * torch.randn(batch, vocab_size, device=DEVICE) for _ in range(copies)]
            for kind, settings in KINDS.items():
                entry = f"sample/{kind}/b{batch}/v{vocab_size}"
                if not report.wants(entry):
                    continue
                buffers = make_buffers(batch, vocab_size, settings)
                us = time_us([partial(ops.sample, buffers, part) for part in logits])
                torchs = [partial(torch_sample, part, settings) for part in logits]
                peers = {"torch": partial(time_us, torchs)} if kind in ("greedy", "top_k_top_p") else {}
                report.add(entry, us, num_bytes, peers=peers)


if __name__ == "__main__":
    raise SystemExit(run_alone(__doc__, run))
