"""Times an engine end to end: start-up, decode step, first token, prefill, arrivals, a mixed run; of Headway also idle
time.

Shapes and method are those usual for comparing engines: a decode step is (time of 136 new tokens - time of 8) / 128 for
prompts of 128 tokens, best of two; prefill is 16 prompts of 4096 tokens and one new token; the mixed run is 256 prompts
of 1024 tokens and 256 new ones; arrivals (Headway alone) are 64 running requests and a new prompt of 512 tokens every 5
steps. Idle time is what lies between the end of a step and the begin of the next on the device's own clock. Start-up is
from the begin of the process to the first token of a prompt of 128 tokens. Weights are random unless the model is a
folder with weights: for a mixture of experts only a shared checkpoint compares engines, and only from a checkpoint
start-up means anything (`bench/random_checkpoint.py`). The report is written after every part: a run that is cut short,
or a part that fails, keeps what the others gave.

usage: python -m bench.engine small --out small.json [--parts decode ttft] [--batches 1 8] [--launch-depth 2] [--eager]
       python -m bench.engine small --side vllm --out small_vllm.json       (where vLLM is installed)
       python -m bench.random_checkpoint nano30b /dev/shm/nano30b --device cuda
       python -m bench.engine /dev/shm/nano30b --load-format auto --out nano30b.json
       python -m bench.engine_table small.json small_vllm.json [...]        (both beside each other, pair by pair)
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.side_bench import SideBench
from bench.sides import SIDES, HeadwaySide, SideOptions, greedy

if TYPE_CHECKING:
    from headway.engine.timeline import Timeline

PROMPT_LEN, SHORT_LEN, LONG_LEN = 128, 8, 136
NUM_STEADY_STEPS = 120  # of a long run: the last ones, when all rows decode


class Bench(SideBench):
    """Prompts share nothing, and Headway's steps are recorded."""

    def __init__(self, args: argparse.Namespace) -> None:
        options = SideOptions(
            model=args.model,
            load_format=args.load_format,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            device=args.device,
            dtype=args.dtype,
            has_prefix_cache=args.prefix_cache,
            launch_depth=args.launch_depth,
            is_eager=args.eager,
        )
        super().__init__(args, options, seed=0)
        self.trace = self.side.llm.trace_steps() if isinstance(self.side, HeadwaySide) else None

    def run(self) -> None:
        self.generate(1, PROMPT_LEN, 1)
        self.report["start_to_first_token_s"] = round(self.clock.elapsed_s, 2)
        self.report["process_to_first_token_s"] = round(process_age_s(), 2)
        self.generate(4, 64, 16)
        self.run_parts((part, partial(self.add, PARTS[part])) for part in self.args.parts)

    def add(self, part: Callable[[Bench], dict[str, Any]]) -> None:
        self.report |= part(self)

    def generate(self, batch: int, prompt_len: int, num_new: int) -> float:
        """Seconds from the call to the last token of the batch."""
        prompts = [self.tokens(prompt_len) for _ in range(batch)]
        if self.trace is not None:
            self.trace.clear()
        begin_s = self.clock.elapsed_s
        lengths = self.side.generate(prompts, num_new, self.clock.check)
        elapsed_s = self.clock.elapsed_s - begin_s
        assert lengths == [num_new] * batch
        return elapsed_s

    def figures(
        self, name: str, select: Callable[[Timeline], Timeline] = lambda whole: whole
    ) -> dict[str, Any]:
        """What the device's clock says of the steps of the last `generate`; nothing for a peer."""
        if self.trace is None:
            return {}
        return {name: select(self.trace.timeline()).figures().asdict()}


def decode(bench: Bench) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for batch in bench.args.batches:
        bench.generate(batch, 64, 4)
        short_s = min(bench.generate(batch, PROMPT_LEN, SHORT_LEN) for _ in range(2))
        long_s = min(bench.generate(batch, PROMPT_LEN, LONG_LEN) for _ in range(2))
        result[f"decode_step_ms_b{batch}"] = round((long_s - short_s) / (LONG_LEN - SHORT_LEN) * 1e3, 4)
        result |= bench.figures(f"decode_b{batch}", last_steps)
        bench.report |= result
        bench.write()
    return result


def last_steps(timeline: Timeline) -> Timeline:
    return timeline.window(len(timeline) - NUM_STEADY_STEPS, len(timeline) - 1)


def prefill(bench: Bench) -> dict[str, Any]:
    bench.generate(4, 2048, 1)
    elapsed_s = min(bench.generate(16, 4096, 1) for _ in range(2))
    return {"prefill_tok_s": round(16 * 4096 / elapsed_s), **bench.figures("prefill")}


def first_token(bench: Bench) -> dict[str, Any]:
    """One prompt of 128 tokens on an idle engine."""
    times_ms = [1e3 * bench.generate(1, 128, 1) for _ in range(12)][2:]
    return {"ttft_ms_median": round(statistics.median(times_ms), 3), "ttft_ms_best": round(min(times_ms), 3)}


def arrivals(bench: Bench) -> dict[str, Any]:
    """64 requests of 320 new tokens each, evenly spread over their lives, so one ends when one comes."""
    if not isinstance(bench.side, HeadwaySide):
        return {}
    from headway import SamplingParams

    num_running, interval, prompt_len = 64, 5, 512
    life = num_running * interval
    llm = bench.side.llm
    engine = llm._engine

    def submit(num_new: int) -> None:
        engine.submit(engine.check("", 0, None, bench.tokens(prompt_len), greedy(SamplingParams, num_new)))

    for index in range(num_running):
        submit((index + 1) * interval)
    for _ in range(num_running * prompt_len // llm.memory_report().max_step_tokens + 2):
        engine.step()
    assert bench.trace is not None
    bench.trace.clear()
    for step in range(40 * interval):
        if step % interval == 0:
            submit(life)
        engine.step()
        bench.clock.check()
    summary = bench.figures("arrivals")
    for completion in engine._outputs.live:
        engine.abort(completion.request)
    while engine.ledger.num_in_flight:
        engine.step()
    return summary


def mixed(bench: Bench) -> dict[str, Any]:
    elapsed_s = bench.generate(256, 1024, 256)
    return {"mixed_out_tok_s": round(256 * 256 / elapsed_s), **bench.figures("mixed")}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "decode": decode,
    "ttft": first_token,
    "prefill": prefill,
    "arrivals": arrivals,
    "mixed": mixed,
}


def process_age_s() -> float:
    """Seconds since this process was started, imports included. Linux: proc(5), field 22 of stat."""
    begin_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return uptime_s - begin_ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", help="a file of bench/models (small, nano9b, nano30b) or a checkpoint folder"
    )
    parser.add_argument("--side", choices=SIDES, default="headway")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown", help="of the tree under test")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--launch-depth", type=int, default=None)
    parser.add_argument(
        "--prefix-cache", action="store_true", help="keep a prefix cache, which nothing here hits"
    )
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--time-limit", type=float, default=300.0, metavar="S", help="for all of it")
    bench = Bench(parser.parse_args())
    bench.run()
    bench.finish()


if __name__ == "__main__":
    main()
