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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headway import SamplingParams, __version__
from headway.engine.batch import StepBatch
from headway.engine.bindings import core
from headway.engine.engine import Engine
from headway.engine.meter import StepMeter
from headway.engine.runner import Runner
from headway.engine.trace import StepTrace
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


@dataclass(frozen=True)
class StepTimes:
    """Medians. A logged step has a server's counters and a profile's record around it."""

    plain_us: float
    logged_us: float


def step_times(num_rows: int, num_steps: int) -> StepTimes:
    """Of both kinds in turn, so that what else the machine does meets both."""
    engine = make_engine(num_rows, num_steps)
    plain = engine.stages
    logged = StepTrace().around(StepMeter().around(plain))
    params = SamplingParams(temperature=0.0, max_tokens=num_steps, ignore_eos=True, detokenize=False)
    for _ in range(num_rows):
        engine.submit(engine.check("", 0, None, [3] * PROMPT_LEN, params))
    times_s: list[float] = []
    while engine.num_unfinished:
        engine.stages = logged if len(times_s) % 2 else plain
        begin_s = time.thread_time()
        engine.step()
        times_s.append(time.thread_time() - begin_s)
    return StepTimes(*(round(1e6 * statistics.median(times_s[kind::2]), 1) for kind in (0, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output-json", default=str(RESULTS / "engine_step.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    times = {str(num_rows): step_times(num_rows, args.steps) for num_rows in args.rows}
    report = {
        "median_step_us_by_rows": {rows: found.plain_us for rows, found in times.items()},
        "median_logged_step_us_by_rows": {rows: found.logged_us for rows, found in times.items()},
        "versions": {"headway": __version__, "torch": torch.__version__},
    }
    Path(args.output_json).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output_json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
