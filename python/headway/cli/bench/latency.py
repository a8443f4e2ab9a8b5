"""`headway bench latency`: batches of equal prompts, one after the other; with --timeline or --plot, their steps."""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.cli.bench.common import (
    CountFlag,
    add_counts,
    percentiles,
    write_report,
)
from headway.cli.bench.datasets import check_fits, random_tokens
from headway.cli.console import open_llm
from headway.cli.flags import add_engine_flags
from headway.errors import ConfigError
from headway.request import SamplingParams

if TYPE_CHECKING:
    from headway.engine.perfetto import Recording
    from headway.llm import LLM
    from headway.outputs import RequestOutput

MIN_STEPS_SEEN = 16  # of a batch: fewer show nothing steady


def add_to(kinds: Any, *, shows_all: bool) -> None:
    parser = kinds.add_parser(
        "latency",
        help="batches of equal prompts",
        description="Runs batches of random prompts, one after the other; the end token is ignored.",
    )
    add_counts(
        parser,
        CountFlag("--batch-size", 1, 8, "prompts of a batch"),
        CountFlag("--input-len", 1, 32, "tokens of a prompt"),
        CountFlag("--output-len", 1, 128, "tokens to generate for each"),
        CountFlag("--n", 1, 1, "completions of each prompt"),
        CountFlag("--num-iters", 1, 3, "batches measured"),
        CountFlag("--num-iters-warmup", 0, 1, "batches run before"),
    )
    parser.add_argument("--disable-detokenize", action="store_true", help="do not turn tokens into text")
    parser.add_argument("--output-json", metavar="FILE", help="write the report here too")
    parser.add_argument("--timeline", metavar="FILE", help="write what CPU and GPU did, for ui.perfetto.dev")
    parser.add_argument("--plot", metavar="FILE", help="draw a few steps, beside those of --launch-depth 0")
    parser.add_argument("--verbose", action="store_true", help="log to stderr even when it is no terminal")
    add_engine_flags(parser, shows_all=shows_all)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check(args)
    report = measure_and_draw(args) if args.timeline or args.plot else measure(args)
    write_report(report, args.output_json)
    if sys.stderr.isatty():
        print(_summary(report), file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    if (args.timeline or args.plot) and args.output_len < MIN_STEPS_SEEN:
        raise ConfigError(f"--output-len must be at least {MIN_STEPS_SEEN}, got {args.output_len}")
    if args.plot:
        from headway.cli.bench.plot import require_matplotlib

        require_matplotlib()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with open_llm(args) as llm:
        return measure_batches(llm, args)


def measure_and_draw(args: argparse.Namespace) -> dict[str, Any]:
    """`measure`, its steps recorded. A plot also runs, and shows first, what it is to be compared with."""
    from headway.engine.perfetto import write_timeline

    report, recording = _record(args)
    recordings = [recording]
    if args.plot and report["launch_depth"]:
        serial_report, serial = _record(argparse.Namespace(**{**vars(args), "launch_depth": 0}))
        report["serial"] = {name: serial_report[name] for name in ("mean_tpot_ms", "steady_decode")}
        recordings.insert(0, serial)
    title = f"{_model_name(args)}, batch {args.batch_size}, {report['dtype']}, {_device_name(report)}"
    if args.timeline:
        write_timeline(Path(args.timeline), recordings, title)
    if args.plot:
        from headway.cli.bench.plot import draw

        draw(Path(args.plot), recordings, title)
    return report


def _record(args: argparse.Namespace) -> tuple[dict[str, Any], Recording]:
    from headway.engine.perfetto import Recording

    with open_llm(args) as llm:
        trace = llm.trace_steps()
        report = measure_batches(llm, args, begin=trace.clear)
    timeline, depth = trace.timeline(), report["launch_depth"]
    report["steady_decode"] = timeline.steady().figures().asdict()
    return report, Recording(f"launch-ahead, depth {depth}" if depth else "serial", timeline)


def _model_name(args: argparse.Namespace) -> str:
    return Path(args.model).name.removesuffix(".json") if hasattr(args, "model") else "shipped model"


def _device_name(report: dict[str, Any]) -> str:
    import torch

    return torch.cuda.get_device_name(report["device"]) if report["device"] != "cpu" else "CPU"


def measure_batches(
    llm: LLM, args: argparse.Namespace, begin: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Latency of each batch, and the times of all requests in them; `begin` is called when warm-up is over."""
    check_fits(args.input_len + args.output_len, llm.max_model_len)
    params = SamplingParams(
        n=args.n,
        temperature=1.0 if args.n > 1 else 0.0,  # greedy completions would be equal
        max_tokens=args.output_len,
        ignore_eos=True,
        detokenize=not args.disable_detokenize,
    )
    draws = random.Random(0)
    latencies: list[float] = []
    outputs: list[RequestOutput] = []
    for iteration in range(args.num_iters_warmup + args.num_iters):
        if iteration == args.num_iters_warmup:
            begin()
        prompts = [random_tokens(draws, llm.vocab_size, args.input_len) for _ in range(args.batch_size)]
        begin_s = time.perf_counter()
        batch = llm.generate(prompts, params)
        if iteration >= args.num_iters_warmup:
            latencies.append(time.perf_counter() - begin_s)
            outputs += batch
    return {
        **llm.describe(),
        **_sizes(args),
        **_throughput(latencies, outputs),
        **_latency(latencies, outputs),
    }


def _sizes(args: argparse.Namespace) -> dict[str, int]:
    names = ("batch_size", "input_len", "output_len", "num_iters")
    return {name: getattr(args, name) for name in names}


def _throughput(latencies: list[float], outputs: list[RequestOutput]) -> dict[str, float]:
    elapsed_s = sum(latencies)
    num_output = sum(output.metrics.num_output_tokens for output in outputs)
    num_prompt = sum(output.metrics.num_prompt_tokens for output in outputs)
    return {
        "elapsed_time": elapsed_s,
        "num_requests": len(outputs),
        "total_num_tokens": num_prompt + num_output,
        "requests_per_second": len(outputs) / elapsed_s,
        "tokens_per_second": (num_prompt + num_output) / elapsed_s,
        "output_tokens_per_second": num_output / elapsed_s,
    }


def _latency(latencies: list[float], outputs: list[RequestOutput]) -> dict[str, Any]:
    """Seconds for whole batches, milliseconds for single requests, as the field's tools print them."""
    ttfts = [output.metrics.ttft_s for output in outputs if output.metrics.ttft_s is not None]
    tpots = [output.metrics.tpot_s for output in outputs if output.metrics.tpot_s is not None]
    return {
        "avg_latency": statistics.fmean(latencies),
        "latencies": latencies,
        "percentiles": percentiles(latencies),
        "mean_ttft_ms": 1e3 * statistics.fmean(ttfts) if ttfts else None,
        "mean_tpot_ms": 1e3 * statistics.fmean(tpots) if tpots else None,
    }


def _summary(report: dict[str, Any]) -> str:
    rate, ttft, tpot = (report[name] for name in ("output_tokens_per_second", "mean_ttft_ms", "mean_tpot_ms"))
    times = f"first token after {ttft:.1f} ms" + (f", then {tpot:.2f} ms a token" if tpot is not None else "")
    return f"{report['batch_size']} requests at once: {rate:.0f} output tokens/s, {times}"
