"""What the engine costs a decode step: plan, launch, sample, commit and output, around a model that does nothing.

    python bench/engine_step.py [--rows 1 8 64 256]

CPU time of one thread, so that other programs do not count. The last line of stdout is the report, also written to
bench/results/. The core's own part (plan and commit) is measured natively beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from headway import SamplingParams, __version__
from headway.engine.batch import StepBatch
from headway.engine.bindings import core
from headway.engine.engine import Engine
from headway.engine.runner import Runner
from headway.sampling.limits import RequestLimits

RESULTS = Path(__file__).parent / "results"
VOCAB_SIZE, PROMPT_LEN, BLOCK_SIZE = 64, 8, 16


class IdleModel:
    """Answers at once."""

    def __init__(self, max_rows: int) -> None:
        self._hidden = torch.zeros(PROMPT_LEN * max_rows, 1)
        self._logits = torch.randn(max_rows, VOCAB_SIZE)

    def forward(self, batch: StepBatch, caches: Any) -> torch.Tensor:
        return self._hidden[: batch.num_tokens]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._logits[: hidden.shape[0]]


def make_engine(max_rows: int, num_steps: int) -> Engine:
    max_model_len = PROMPT_LEN + num_steps + 2
    config = core.LedgerConfig(
        max_rows=max_rows,
        num_blocks=max_rows * (max_model_len // BLOCK_SIZE + 2),
        block_size=BLOCK_SIZE,
        num_slots=max_rows,
        max_model_len=max_model_len,
        max_step_tokens=PROMPT_LEN * max_rows,
        vocab_size=VOCAB_SIZE,
        max_logprobs=0,
    )
    runner = Runner(IdleModel(max_rows), None, config, torch.device("cpu"))  # type: ignore[arg-type]
    limits = RequestLimits(
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        max_logprobs=0,
        max_stop_ids=core.MAX_STOP_IDS,
        max_logit_bias=core.MAX_LOGIT_BIAS,
        max_bad_word_entries=core.MAX_BAD_WORD_ENTRIES,
        eos_token_ids=(),
    )
    return Engine(core.Ledger(config), runner, limits)


def median_step_us(num_rows: int, num_steps: int) -> float:
    engine = make_engine(num_rows, num_steps)
    params = SamplingParams(temperature=0.0, max_tokens=num_steps, ignore_eos=True, detokenize=False)
    for _ in range(num_rows):
        engine.submit(engine.check("", 0, None, [3] * PROMPT_LEN, params))
    times = []
    while engine.num_unfinished:
        begin_s = time.thread_time()
        engine.step()
        times.append(time.thread_time() - begin_s)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output-json", default=str(RESULTS / "engine_step.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps_us = {str(num_rows): round(median_step_us(num_rows, args.steps), 1) for num_rows in args.rows}
    report = {
        "median_step_us_by_rows": steps_us,
        "versions": {"headway": __version__, "torch": torch.__version__},
    }
    Path(args.output_json).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output_json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
