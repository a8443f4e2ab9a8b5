"""`headway bench serve`: measures a running OpenAI-compatible server, ours or another's, with streamed requests."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.cli.bench.common import between, write_report
from headway.cli.bench.datasets import add_dataset_flags, given_dataset
from headway.cli.bench.load import METRICS, Arrivals, latencies_ms, num_within, send_all, totals
from headway.cli.bench.openai_stream import Answer, Target, ask
from headway.cli.bench.serve_flags import (
    add_load_flags,
    add_report_flags,
    add_request_flags,
    arrivals,
    goodput_limits,
)
from headway.cli.flags import API_KEY_VARIABLE
from headway.errors import BuildError, ConfigError, HeadwayError, ServerError

if TYPE_CHECKING:
    import httpx

ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
SAFE_VOCAB_SIZE = 1000  # where a server does not say how many tokens it has
RETRY_S = 0.5
Ask = Callable[[], Awaitable[Answer]]


def add_to(kinds: Any, *, shows_all: bool) -> None:
    parser = kinds.add_parser(
        "serve",
        help="a running server",
        description="Sends streamed requests to a running server and measures their answers. "
        f"{API_KEY_VARIABLE} in the environment is sent as the API key.",
    )
    group = parser.add_argument_group("server")
    group.add_argument("--backend", choices=tuple(ENDPOINTS), default="openai", help="protocol (openai)")
    group.add_argument(
        "--base-url", metavar="URL", help="such as http://127.0.0.1:8000; unset: host and port"
    )
    group.add_argument("--host", default="127.0.0.1", help="of the server (127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="of the server (8000)")
    group.add_argument("--endpoint", metavar="PATH", help="unset: the backend's")
    group.add_argument("--model", metavar="NAME", help="unset: the first that the server lists")
    group.add_argument(
        "--ready-check-timeout-sec", type=between(0, 1e6), default=0.0, metavar="S", help="wait for it (0)"
    )
    add_load_flags(parser)
    add_dataset_flags(parser, seed_flag=True)
    add_request_flags(parser)
    add_report_flags(parser)
    parser.add_argument("--help-all", action="help", help="as --help")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    limits_ms = goodput_limits(args.goodput)
    when = arrivals(args)
    report = asyncio.run(measure(args, when, limits_ms))
    is_saved = args.save_result or args.save_detailed or args.result_filename
    write_report(report, str(_result_path(args, report)) if is_saved else None)
    if sys.stderr.isatty():
        print(_summary(report), file=sys.stderr)
    if not report["completed"]:
        raise HeadwayError(f"no request was answered; the first error: {report['first_error']}")
    return 0


async def measure(args: argparse.Namespace, when: Arrivals, limits_ms: dict[str, float]) -> dict[str, Any]:
    """The whole benchmark against the server that the flags name. Raises ConfigError where none answers."""
    prompts_of = partial(given_dataset(args).draw, args.num_prompts, seed=args.seed)
    async with _client(args) as http:
        model = await _model(args, http)
        prompts = prompts_of(vocab_size=await _vocab_size(http))
        target = _target(args, model)
        asks: list[Ask] = [
            partial(ask, http, target, prompt, f"bench-{args.seed}-{i}") for i, prompt in enumerate(prompts)
        ]
        await _warm_up(args, asks)
        if args.profile:
            await _control(http, "/start_profile")
        begin_s = time.perf_counter()
        answers = await send_all(asks, when.offsets_s(len(asks), args.seed), args.max_concurrency)
        duration_s = time.perf_counter() - begin_s
        about = _about(args, model)
        if args.profile:
            about["profile"] = _kept(args, about, await _control(http, "/stop_profile"))
    return {
        **about,
        **totals(answers, duration_s),
        **({"request_goodput": num_within(answers, limits_ms) / duration_s} if limits_ms else {}),
        **latencies_ms(answers, args.percentile_metrics, args.metric_percentiles),
        "first_error": next((answer.error for answer in answers if not answer.is_ok), ""),
        **(_details(answers) if args.save_detailed else {}),
    }


async def _control(http: httpx.AsyncClient, path: str) -> bytes:
    reply = await http.post(path)
    if reply.status_code != 200:
        hint = "headway serve offers it with --enable-dev-endpoints"
        raise ServerError(f"the server answers {reply.status_code} to {path}", hint=hint)
    return reply.content


def _kept(args: argparse.Namespace, about: dict[str, Any], profile: bytes) -> str:
    """Where the profile lies; other servers keep theirs."""
    if not profile:
        return ""
    path = _result_path(args, about).with_suffix(".profile.json")
    path.write_bytes(profile)
    return str(path)


async def _warm_up(args: argparse.Namespace, asks: list[Ask]) -> None:
    for answer in await asyncio.gather(*(asks[i % len(asks)]() for i in range(args.num_warmups))):
        if not answer.is_ok:
            raise HeadwayError(f"a warm-up request failed: {answer.error}")


def _client(args: argparse.Namespace) -> httpx.AsyncClient:
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise BuildError(f"{error.name} is not installed", hint="pip install 'headway[bench]'") from error
    key = os.environ.get(API_KEY_VARIABLE)
    return httpx.AsyncClient(
        base_url=args.base_url or f"http://{args.host}:{args.port}",
        headers={"authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(None, connect=30.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,  # a proxy would be measured with it
    )


async def _model(args: argparse.Namespace, http: httpx.AsyncClient) -> str:
    """The name to ask for, once the server answers."""
    import httpx

    deadline_s = time.perf_counter() + args.ready_check_timeout_sec
    while True:
        try:
            reply = await http.get("/v1/models")
            reply.raise_for_status()
            return args.model or str(reply.json()["data"][0]["id"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
            if time.perf_counter() >= deadline_s:
                message = f"no server answers at {http.base_url}: {error or type(error).__name__}"
                raise ConfigError(message, hint="--base-url, --ready-check-timeout-sec") from error
        await asyncio.sleep(RETRY_S)


async def _vocab_size(http: httpx.AsyncClient) -> int:
    reply = await http.get("/tokenizer_info")
    try:
        return int(reply.json()["vocab_size"]) if reply.status_code == 200 else SAFE_VOCAB_SIZE
    except (ValueError, LookupError, TypeError):
        return SAFE_VOCAB_SIZE


def _target(args: argparse.Namespace, model: str) -> Target:
    common: dict[str, Any] = {
        "model": model,
        "temperature": args.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    for name in ("top_p", "top_k"):
        if getattr(args, name) is not None:
            common[name] = getattr(args, name)
    if args.ignore_eos:
        common["ignore_eos"] = True
    return Target(
        args.endpoint or ENDPOINTS[args.backend], {**common, **args.extra_body}, args.backend == "openai-chat"
    )


def _about(args: argparse.Namespace, model: str) -> dict[str, Any]:
    rate = args.request_rate
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": args.backend,
        "endpoint_type": args.backend,
        "label": args.label,
        "model_id": model,
        "num_prompts": args.num_prompts,
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
    }


def _details(answers: list[Answer]) -> dict[str, list[Any]]:
    return {
        "input_lens": [answer.num_input_tokens for answer in answers],
        "output_lens": [answer.num_output_tokens for answer in answers],
        "ttfts": [answer.ttft_s for answer in answers],
        "itls": [answer.gaps_s for answer in answers],
        "generated_texts": [answer.text for answer in answers],
        "errors": [answer.error for answer in answers],
    }


def _result_path(args: argparse.Namespace, report: dict[str, Any]) -> Path:
    model = Path(report["model_id"]).name
    rate, date = report["request_rate"], report["date"]
    name = args.result_filename or f"{args.backend}-{rate}qps-{model}-{date}.json"
    folder = Path(args.result_dir or ".")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def _summary(report: dict[str, Any]) -> str:
    parts = [f"{report['completed']} answered, {report['failed']} failed in {report['duration']:.1f} s"]
    parts.append(
        f"{report['request_throughput']:.1f} requests/s, {report['output_throughput']:.0f} output tokens/s"
    )
    parts += [
        f"{name} {report[f'mean_{name}_ms']:.2f} ms in the mean, {report[f'median_{name}_ms']:.2f} in the middle"
        for name in METRICS
        if f"mean_{name}_ms" in report
    ]
    return "\n".join(parts)
