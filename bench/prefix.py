"""What a prefix cache saves: time to first token and computed prompt tokens of prefixes seen before, and of chats.

- sights: for each length, three prompts in turn that share a prefix of that many tokens and end in 64 of their own.
- chat: 16 conversations of 8 turns, all 16 at once: a turn brings 300 tokens and is answered by 100. The ideal computes
  a turn's new tokens alone: what is asked, and the last token of the answer before, whose state nobody has computed.
- cold: prompts that share nothing, for the price of keeping a cache: run once with and once without --no-cache.

One engine a process; `bench.prefix_table` puts two reports beside each other.

usage: python -m bench.prefix nano9b --out ours.json [--side vllm] [--lengths 100 8192] [--no-cache]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.sides import SIDES, Side, SideOptions

LENGTHS = (100, 528, 1056, 2100, 4000, 8192)
SUFFIX_LEN, NUM_SIGHTS, NUM_PREFIXES = 64, 3, 3
NUM_CHATS, NUM_TURNS, QUESTION_LEN, ANSWER_LEN = 16, 8, 300, 100


class PrefixBench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.draws = random.Random(1)
        self.side: Side = SIDES[args.side](
            SideOptions(
                model=args.model,
                load_format=args.load_format,
                max_model_len=max(*args.lengths, NUM_TURNS * (QUESTION_LEN + ANSWER_LEN)) + SUFFIX_LEN + 16,
                max_num_seqs=64,
                has_prefix_cache=not args.no_cache,
                device=args.device,
            )
        )
        for num_tokens in (
            32,
            600,
            600,
            max(args.lengths) + SUFFIX_LEN,
        ):  # code is loaded, autotuners are done
            self.side.answer([self.tokens(num_tokens)], 2)
        self.side.answer([self.tokens(QUESTION_LEN) for _ in range(NUM_CHATS)], 2)

    def tokens(self, num_tokens: int) -> list[int]:
        return [self.draws.randrange(10, self.side.vocab_size - 10) for _ in range(num_tokens)]

    def run(self) -> dict[str, Any]:
        report: dict[str, Any] = {
            "model": self.args.model,
            "has_prefix_cache": not self.args.no_cache,
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            **self.side.describe(),
        }
        for part in self.args.parts:
            report |= PARTS[part](self)
        return report


def sights(bench: PrefixBench) -> dict[str, Any]:
    """Medians over several prefixes of each length."""
    table = []
    for num_prefix in bench.args.lengths:
        times_ms: list[list[float]] = [[] for _ in range(NUM_SIGHTS)]
        computed: list[list[int]] = [[] for _ in range(NUM_SIGHTS)]
        for _ in range(NUM_PREFIXES):
            prefix = bench.tokens(num_prefix)
            for sight in range(NUM_SIGHTS):
                answer = bench.side.answer([prefix + bench.tokens(SUFFIX_LEN)], 2)[0]
                times_ms[sight].append(1e3 * answer.first_token_s)
                computed[sight].append(num_prefix + SUFFIX_LEN - answer.num_cached_tokens)
        table.append(
            {
                "prefix_tokens": num_prefix,
                "ttft_ms": [round(statistics.median(times), 3) for times in times_ms],
                "computed_tokens": [round(statistics.median(counts)) for counts in computed],
            }
        )
    return {"sights": table}


def chat(bench: PrefixBench) -> dict[str, Any]:
    histories: list[list[int]] = [[] for _ in range(NUM_CHATS)]
    times_s: list[float] = []
    computed, ideal = 0, 0
    for turn in range(NUM_TURNS):
        histories = [history + bench.tokens(QUESTION_LEN) for history in histories]
        answers = bench.side.answer(histories, ANSWER_LEN)
        computed += sum(
            len(history) - answer.num_cached_tokens
            for history, answer in zip(histories, answers, strict=True)
        )
        ideal += NUM_CHATS * (QUESTION_LEN + (turn > 0))
        times_s += [answer.first_token_s for answer in answers]
        histories = [history + answer.token_ids for history, answer in zip(histories, answers, strict=True)]
    return {
        "chat": {
            "computed_tokens": computed,
            "ideal_tokens": ideal,
            "computed_over_ideal": round(computed / ideal, 4),
            "ttft_ms_mean": round(1e3 * statistics.fmean(times_s), 3),
        }
    }


def cold(bench: PrefixBench) -> dict[str, Any]:
    """Best of three: one long prompt's first token, and 64 rows that decode."""
    prefill_s = min(bench.side.answer([bench.tokens(8192)], 1)[0].first_token_s for _ in range(3))
    decode_ms = min(decode_step_ms(bench) for _ in range(3))
    return {"cold": {"ttft_ms_8192": round(1e3 * prefill_s, 3), "decode_step_ms_b64": round(decode_ms, 4)}}


def decode_step_ms(bench: PrefixBench) -> float:
    def seconds(num_new: int) -> float:
        prompts = [bench.tokens(128) for _ in range(64)]
        begin_s = time.perf_counter()
        bench.side.generate(prompts, num_new)
        return time.perf_counter() - begin_s

    return (seconds(136) - seconds(8)) / 128 * 1e3


PARTS: dict[str, Callable[[PrefixBench], dict[str, Any]]] = {"sights": sights, "chat": chat, "cold": cold}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a file of bench/models (small, nano9b) or a checkpoint folder")
    parser.add_argument("--side", choices=SIDES, default="headway")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    bench = PrefixBench(args)
    report = bench.run()
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    bench.side.close()


if __name__ == "__main__":
    main()
