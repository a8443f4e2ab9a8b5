"""`headway bench throughput`: many requests at once, until the last is done."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import TYPE_CHECKING, Any

from headway.cli.bench.common import CountFlag, add_counts, write_report
from headway.cli.bench.datasets import BenchPrompt, add_dataset_flags, check_fits, given_dataset
from headway.cli.console import open_llm, prepared_settings
from headway.cli.flags import add_engine_flags
from headway.request import SamplingParams

if TYPE_CHECKING:
    from headway.outputs import RequestMetrics


def add_to(kinds: Any, *, shows_all: bool) -> None:
    parser = kinds.add_parser(
        "throughput",
        help="many requests at once",
        description="Queues all requests at once and takes the time until the last is done; the end token is ignored.",
    )
    add_dataset_flags(parser, seed_flag=False)  # --seed is the engine's, and of the prompts
    add_counts(parser, CountFlag("--n", 1, 1, "completions of each prompt"))
    parser.add_argument("--async-engine", action="store_true", help="through AsyncLLM in place of LLM")
    parser.add_argument("--disable-detokenize", action="store_true", help="do not turn tokens into text")
    parser.add_argument("--output-json", metavar="FILE", help="write the report here too")
    parser.add_argument("--verbose", action="store_true", help="log to stderr even when it is no terminal")
    add_engine_flags(parser, shows_all=shows_all)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    report = asyncio.run(_measure_async(args)) if args.async_engine else _measure(args)
    write_report(report, args.output_json)
    if sys.stderr.isatty():
        rates = (report[f"{name}_per_second"] for name in ("requests", "tokens", "output_tokens"))
        print("{:.2f} requests/s, {:.0f} tokens/s, {:.0f} output tokens/s".format(*rates), file=sys.stderr)
    return 0


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    with open_llm(args) as llm:
        prompts = _prompts(args, llm.vocab_size, llm.max_model_len)
        params = [_params(args, prompt) for prompt in prompts]
        begin_s = time.perf_counter()
        outputs = llm.generate([prompt.token_ids for prompt in prompts], params)
        elapsed_s = time.perf_counter() - begin_s
        return {**llm.describe(), **_figures(elapsed_s, [output.metrics for output in outputs])}


async def _measure_async(args: argparse.Namespace) -> dict[str, Any]:
    keywords = prepared_settings(args)
    from headway import AsyncLLM

    async with AsyncLLM(keywords.pop("model", None), **keywords) as llm:
        info = llm.info

        async def ask(prompt: BenchPrompt) -> RequestMetrics:
            async for output in llm.generate(prompt.token_ids, _params(args, prompt)):
                last = output.metrics
            return last

        prompts = _prompts(args, info.vocab_size, info.max_model_len)
        begin_s = time.perf_counter()
        metrics = await asyncio.gather(*map(ask, prompts))
        elapsed_s = time.perf_counter() - begin_s
        what = {name: getattr(info, name) for name in ("device", "dtype", "family", "launch_depth")}
        return {**what, **_figures(elapsed_s, metrics)}


def _prompts(args: argparse.Namespace, vocab_size: int, max_model_len: int) -> list[BenchPrompt]:
    dataset = given_dataset(args)
    check_fits(dataset.longest, max_model_len)
    return dataset.draw(args.num_prompts, vocab_size, getattr(args, "seed", 0))


def _params(args: argparse.Namespace, prompt: BenchPrompt) -> SamplingParams:
    return SamplingParams(
        n=args.n,
        temperature=1.0,
        max_tokens=prompt.output_len,
        ignore_eos=True,
        detokenize=not args.disable_detokenize,
        output_kind="final_only",
    )


def _figures(elapsed_s: float, metrics: list[RequestMetrics]) -> dict[str, float]:
    num_output = sum(found.num_output_tokens for found in metrics)
    num_tokens = num_output + sum(found.num_prompt_tokens for found in metrics)
    return {
        "elapsed_time": elapsed_s,
        "num_requests": len(metrics),
        "total_num_tokens": num_tokens,
        "requests_per_second": len(metrics) / elapsed_s,
        "tokens_per_second": num_tokens / elapsed_s,
        "output_tokens_per_second": num_output / elapsed_s,
    }
