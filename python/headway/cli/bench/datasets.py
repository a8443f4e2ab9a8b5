"""Prompts of random tokens, by the names and flags of vLLM's data sets. The same seed gives the same prompts."""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from typing import Protocol

from headway.cli.bench.common import CountFlag, add_counts, at_least, between
from headway.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """Token ids, and how many tokens to ask for."""

    token_ids: list[int]
    output_len: int


class Dataset(Protocol):
    """Prompts of one kind."""

    @property
    def longest(self) -> int:
        """Tokens of prompt and output of the longest request."""
        ...

    def draw(self, num_prompts: int, vocab_size: int, seed: int) -> list[BenchPrompt]: ...


@dataclass(frozen=True, slots=True)
class RandomPrompts:
    """Lengths in tokens; those of input and output are uniform in [x (1 - r), x (1 + r)]."""

    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0  # tokens that all prompts begin with, beside input_len

    @property
    def longest(self) -> int:
        """Prompt and output of the longest request."""
        return self.prefix_len + sum(self._bounds(n)[1] for n in (self.input_len, self.output_len))

    def draw(self, num_prompts: int, vocab_size: int, seed: int) -> list[BenchPrompt]:
        draws = random.Random(seed)
        prefix = random_tokens(draws, vocab_size, self.prefix_len)
        prompts = []
        for _ in range(num_prompts):
            input_len = draws.randint(*self._bounds(self.input_len))
            output_len = draws.randint(*self._bounds(self.output_len))
            prompts.append(BenchPrompt(prefix + random_tokens(draws, vocab_size, input_len), output_len))
        return prompts

    def _bounds(self, num_tokens: int) -> tuple[int, int]:
        low = max(1, round(num_tokens * (1 - self.range_ratio)))
        return low, max(low, round(num_tokens * (1 + self.range_ratio)))


@dataclass(frozen=True, slots=True)
class PrefixRepetition:
    """Prompts that share their beginnings: each has one of a few prefixes and a suffix of its own, in any order."""

    prefix_len: int
    suffix_len: int
    num_prefixes: int
    output_len: int

    @property
    def longest(self) -> int:
        return self.prefix_len + self.suffix_len + self.output_len

    def draw(self, num_prompts: int, vocab_size: int, seed: int) -> list[BenchPrompt]:
        draws = random.Random(seed)
        prefixes = [random_tokens(draws, vocab_size, self.prefix_len) for _ in range(self.num_prefixes)]
        prompts = []
        for i in range(num_prompts):
            suffix = random_tokens(draws, vocab_size, self.suffix_len)
            prompts.append(BenchPrompt(prefixes[i % self.num_prefixes] + suffix, self.output_len))
        draws.shuffle(prompts)
        return prompts


def random_tokens(draws: random.Random, vocab_size: int, num_tokens: int) -> list[int]:
    return draws.choices(range(vocab_size), k=num_tokens)


def add_dataset_flags(parser: argparse.ArgumentParser, *, seed_flag: bool) -> None:
    """Names and defaults are vLLM's."""
    group = parser.add_argument_group("prompts of random tokens")
    group.add_argument(
        "--dataset-name",
        choices=("random", "prefix_repetition"),
        default="random",
        help="kind of prompts (random)",
    )
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
    add_counts(
        group,
        CountFlag("--prefix-repetition-prefix-len", 0, 256, "tokens of a shared beginning"),
        CountFlag("--prefix-repetition-suffix-len", 1, 256, "tokens of each prompt's own"),
        CountFlag("--prefix-repetition-num-prefixes", 1, 10, "beginnings"),
        CountFlag("--prefix-repetition-output-len", 1, 128, "tokens to generate for each"),
    )
    group.add_argument("--input-len", type=at_least(1), metavar="N", help="the same as --random-input-len")
    group.add_argument("--output-len", type=at_least(1), metavar="N", help="the same as --random-output-len")
    if seed_flag:
        group.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals (0)")


def given_dataset(args: argparse.Namespace) -> Dataset:
    if args.dataset_name == "prefix_repetition":
        return PrefixRepetition(
            args.prefix_repetition_prefix_len,
            args.prefix_repetition_suffix_len,
            args.prefix_repetition_num_prefixes,
            args.prefix_repetition_output_len,
        )
    return RandomPrompts(
        args.input_len or args.random_input_len,
        args.output_len or args.random_output_len,
        args.random_range_ratio,
        args.random_prefix_len,
    )


def check_fits(num_tokens: int, max_model_len: int) -> None:
    if num_tokens > max_model_len:
        raise ConfigError(
            f"--input-len and --output-len must sum to at most {max_model_len} tokens (--max-model-len), "
            f"got {num_tokens}"
        )
