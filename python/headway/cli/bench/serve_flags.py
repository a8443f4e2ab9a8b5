"""Flags of `headway bench serve` but those that name the server, and what they mean."""

from __future__ import annotations

import argparse
import math

from headway.cli.bench.common import at_least, between
from headway.cli.bench.load import METRICS, Arrivals
from headway.cli.flags import parse_object
from headway.errors import ConfigError


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument(
        "--request-rate",
        type=_positive,
        default=math.inf,
        metavar="X",
        help="requests a second; inf: all at once",
    )
    group.add_argument(
        "--burstiness", type=_positive, default=1.0, metavar="X", help="1: Poisson; below, in clumps (1)"
    )
    group.add_argument(
        "--max-concurrency", type=at_least(1), metavar="N", help="requests at once; unset: any"
    )
    group.add_argument("--ramp-up-strategy", choices=("linear", "exponential"), help="the rate grows")
    group.add_argument("--ramp-up-start-rps", type=_positive, metavar="X", help="from this rate")
    group.add_argument("--ramp-up-end-rps", type=_positive, metavar="X", help="to this one")
    group.add_argument("--num-warmups", type=at_least(0), default=0, metavar="N", help="requests before (0)")


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument("--temperature", type=between(0, 2), default=0.0, metavar="X", help="(0)")
    group.add_argument("--top-p", type=between(0, 1), metavar="X", help="unset: the server's")
    group.add_argument("--top-k", type=int, metavar="N", help="unset: the server's")
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for exactly as many tokens; OpenAI's own servers refuse it",
    )
    group.add_argument("--extra-body", type=parse_object, default={}, metavar="JSON", help="further fields")


def add_report_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("report")
    group.add_argument(
        "--percentile-metrics",
        type=_metric_names,
        default=METRICS,
        metavar="A,B",
        help="of " + ",".join(METRICS),
    )
    group.add_argument("--metric-percentiles", type=_percents, default=(99.0,), metavar="P,Q", help="(99)")
    group.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help="such as ttft:200 tpot:50")
    group.add_argument("--save-result", action="store_true", help="write the report to a file as well")
    group.add_argument(
        "--save-detailed", action="store_true", help="with every request's times and text in it"
    )
    group.add_argument("--result-dir", metavar="DIR", help="where to; unset: here")
    group.add_argument("--result-filename", metavar="FILE", help="unset: named after rate, model and time")
    group.add_argument(
        "--profile",
        action="store_true",
        help="record the server's steps meanwhile, into a file beside the report; "
        "headway serve needs --enable-dev-endpoints",
    )
    group.add_argument("--label", help="goes into the report")


def arrivals(args: argparse.Namespace) -> Arrivals:
    rates = (args.ramp_up_start_rps, args.ramp_up_end_rps)
    if args.ramp_up_strategy is None:
        if rates != (None, None):
            raise ConfigError("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy")
        return Arrivals(args.request_rate, args.burstiness)
    if None in rates or not math.isinf(args.request_rate):
        raise ConfigError(
            "--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps, and no --request-rate"
        )
    return Arrivals(math.inf, args.burstiness, args.ramp_up_strategy, rates)


def goodput_limits(words: list[str]) -> dict[str, float]:
    limits_ms = {}
    for word in words:
        name, _, number = word.partition(":")
        try:
            limits_ms[name] = _positive(number)
        except (ValueError, argparse.ArgumentTypeError):
            name = ""
        if name not in METRICS:
            raise ConfigError(f"--goodput must be NAME:MS with a name of {', '.join(METRICS)}, got {word!r}")
    return limits_ms


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _metric_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(METRICS):
        raise argparse.ArgumentTypeError(f"must be names of {','.join(METRICS)}, got {text!r}")
    return names


def _percents(text: str) -> tuple[float, ...]:
    return tuple(between(0, 100)(word) for word in text.split(","))
