"""What the benchmarks share: flags with limits, prompts of random tokens, reports."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from headway.errors import ConfigError

PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """Token ids, and how many tokens to ask for."""

    token_ids: list[int]
    output_len: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of the prompts of a data set, in tokens; input and output lengths are uniform in [x (1 - r), x (1 + r)]."""

    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0  # tokens that all prompts begin with, beside input_len

    @property
    def longest(self) -> int:
        """Prompt and output of the longest request."""
        return self.prefix_len + sum(self._bounds(n)[1] for n in (self.input_len, self.output_len))

    def draw(self, draws: random.Random) -> tuple[int, int]:
        """Tokens of a prompt without its prefix, and of its output."""
        return draws.randint(*self._bounds(self.input_len)), draws.randint(*self._bounds(self.output_len))

    def _bounds(self, num_tokens: int) -> tuple[int, int]:
        low = max(1, round(num_tokens * (1 - self.range_ratio)))
        return low, max(low, round(num_tokens * (1 + self.range_ratio)))


def random_prompts(lengths: Lengths, num_prompts: int, vocab_size: int, seed: int) -> list[BenchPrompt]:
    """The same for the same seed."""
    draws = random.Random(seed)
    prefix = random_tokens(draws, vocab_size, lengths.prefix_len)
    prompts = []
    for _ in range(num_prompts):
        input_len, output_len = lengths.draw(draws)
        prompts.append(BenchPrompt(prefix + random_tokens(draws, vocab_size, input_len), output_len))
    return prompts


def random_tokens(draws: random.Random, vocab_size: int, num_tokens: int) -> list[int]:
    return draws.choices(range(vocab_size), k=num_tokens)


class CountFlag(NamedTuple):
    """A flag for a whole number."""

    name: str
    low: int
    default: int
    meaning: str


def add_counts(group: Any, *flags: CountFlag) -> None:
    """To a parser or to a group of one."""
    for flag in flags:
        text = f"{flag.meaning} ({flag.default})"
        group.add_argument(flag.name, type=at_least(flag.low), default=flag.default, metavar="N", help=text)


def add_dataset_flags(parser: argparse.ArgumentParser, *, seed_flag: bool) -> None:
    """Names and defaults of vLLM's random data set."""
    group = parser.add_argument_group("prompts of random tokens")
    group.add_argument("--dataset-name", choices=("random",), default="random", help="the one there is")
    add_counts(
        group,
        CountFlag("--num-prompts", 1, 1000, "requests"),
        CountFlag("--random-input-len", 1, 1024, "tokens of a prompt"),
        CountFlag("--random-output-len", 1, 128, "tokens to generate for each"),
        CountFlag("--random-prefix-len", 0, 0, "tokens that all prompts begin with, beside those"),
    )
    group.add_argument(
        "--random-range-ratio",
        type=between(0, 1),
        default=0.0,
        metavar="R",
        help="lengths are uniform in [N (1 - R), N (1 + R)] (0)",
    )
    group.add_argument("--input-len", type=at_least(1), metavar="N", help="the same as --random-input-len")
    group.add_argument("--output-len", type=at_least(1), metavar="N", help="the same as --random-output-len")
    if seed_flag:
        group.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals (0)")


def given_lengths(args: argparse.Namespace) -> Lengths:
    return Lengths(
        args.input_len or args.random_input_len,
        args.output_len or args.random_output_len,
        args.random_range_ratio,
        args.random_prefix_len,
    )


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type."""

    def read(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    read.__name__ = "integer"  # argparse names it where the text is none
    return read


def between(low: float, high: float) -> Callable[[str], float]:
    """An argparse type; NaN is not between anything."""

    def read(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be in [{low:g}, {high:g}], got {text}")
        return value

    read.__name__ = "number"
    return read


def check_fits(num_tokens: int, max_model_len: int) -> None:
    if num_tokens > max_model_len:
        raise ConfigError(
            f"--input-len and --output-len must sum to at most {max_model_len} tokens (--max-model-len), "
            f"got {num_tokens}"
        )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Interpolated, by percent."""
    import numpy as np

    return dict(zip(map(str, PERCENTILES), np.percentile(values, PERCENTILES).tolist(), strict=True))


def write_report(report: dict[str, Any], output_json: str | None) -> None:
    """One line on stdout, and in a file where one is named."""
    text = json.dumps(report)
    print(text, flush=True)
    if output_json:
        Path(output_json).write_text(text + "\n", encoding="utf-8")
