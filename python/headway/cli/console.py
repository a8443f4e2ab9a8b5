"""What a person at a terminal sees on stderr: log lines, loading progress, speed. stdout is for results alone."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING, Any

from headway.cli.flags import given_settings
from headway.config import EngineConfig

if TYPE_CHECKING:
    from headway.llm import LLM
    from headway.outputs import RequestMetrics

_BAR_WIDTH = 30


def open_llm(args: argparse.Namespace, **settings: Any) -> LLM:
    """The engine that the flags describe; logs and progress go to stderr when it is a terminal."""
    keywords = prepared_settings(args, **settings)
    from headway import LLM

    progress = show_progress if sys.stderr.isatty() else None
    return LLM(keywords.pop("model", None), progress=progress, **keywords)


def prepared_settings(args: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """Keywords of the engine, flags over `settings`, checked before torch is imported. Turns the log on."""
    show_log(logging.INFO if sys.stderr.isatty() or args.verbose else logging.ERROR)
    keywords = {**settings, **given_settings(args)}
    EngineConfig(**keywords)
    return keywords


def show_log(level: int) -> None:
    logger = logging.getLogger("headway")
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


def show_progress(num_done: int, num_total: int) -> None:
    """A bar that redraws itself; ends its line when done."""
    share = num_done / num_total if num_total else 1.0
    filled = round(_BAR_WIDTH * share)
    end = "\n" if num_done >= num_total else ""
    line = f"\rloading weights [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {100 * share:3.0f} %"
    print(line, end=end, file=sys.stderr, flush=True)


def speed_line(metrics: RequestMetrics) -> str:
    """One line: tokens, decode speed, time to first token."""
    parts = [f"{metrics.num_prompt_tokens} prompt + {metrics.num_output_tokens} output tokens"]
    if metrics.ttft_s is not None:
        parts.append(f"first after {1e3 * metrics.ttft_s:.1f} ms")
    if metrics.tpot_s:
        parts.append(f"then {1 / metrics.tpot_s:.1f} tokens/s")
    return ", ".join(parts)
