"""What a prefix cache saves: time to first token and computed prompt tokens of prefixes seen before, and of chats; and
what it costs where nothing is shared.

- sights: for each length, three prompts in turn that share a prefix of that many tokens and end in 64 of their own.
- chat: 16 conversations of 8 turns, all 16 at once: a turn brings 300 tokens and is answered by 100. The ideal computes
  a turn's new tokens alone: what is asked, and the last token of the answer before, whose state nobody has computed.
- overhead (Headway alone): prefill of 8 prompts of 4,096 tokens and decode steps of 64 rows, requests that use the
  cache and find nothing in turn with requests that opt out; medians of pairs.
- cold: one long prompt's first token, and 64 rows that decode, for a run with and a run without --no-cache.

One engine a process. The report is written after every length and part: a run that is cut short, or a part that fails,
keeps what the others gave. `bench.prefix_table` puts two reports beside each other.

usage: python -m bench.prefix nano9b --out ours.json [--side vllm] [--lengths 100 8192] [--parts sights chat]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.side_bench import SideBench
from bench.sides import SIDES, Answer, HeadwaySide, SideOptions, greedy

LENGTHS = (100, 500, 1056, 1408, 2048, 4096, 8192)
SUFFIX_LEN, NUM_SIGHTS, NUM_PREFIXES = 64, 3, 3
NUM_CHATS, NUM_TURNS, QUESTION_LEN, ANSWER_LEN = 16, 8, 300, 100
NUM_COLD_PROMPTS, COLD_LEN, NUM_PAIRS = 8, 4096, 3
NUM_ROWS, PROMPT_LEN, SHORT_LEN, LONG_LEN = 64, 128, 8, 136


class PrefixBench(SideBench):
    def __init__(self, args: argparse.Namespace) -> None:
        longest = max(*args.lengths, COLD_LEN, NUM_TURNS * (QUESTION_LEN + ANSWER_LEN))
        options = SideOptions(
            model=args.model,
            load_format=args.load_format,
            max_model_len=longest + SUFFIX_LEN + 16,
            max_num_seqs=NUM_ROWS,
            has_prefix_cache=not args.no_cache,
            device=args.device,
        )
        super().__init__(args, options, seed=1)

    def run(self) -> None:
        self.warm_up()
        self.run_parts((part, partial(PARTS[part], self)) for part in self.args.parts)

    def warm_up(self) -> None:
        """Code is loaded and autotuners are done: every length twice, since what follows a hit is shorter."""
        for num_tokens in (32, SUFFIX_LEN, *self.args.lengths):
            prompt = self.tokens(num_tokens)
            for _ in range(2):
                self.side.answer([prompt + self.tokens(SUFFIX_LEN)], 2)
        self.side.answer([self.tokens(QUESTION_LEN) for _ in range(NUM_CHATS)], 2)
        self.side.reset_prefix_cache()

    def answer(self, prompts: list[list[int]], num_new: int) -> list[Answer]:
        self.clock.check()
        return self.side.answer(prompts, num_new)


def sights(bench: PrefixBench) -> None:
    """Medians over several prefixes of each length."""
    table: list[dict[str, Any]] = []
    bench.report["sights"] = table
    for num_prefix in bench.args.lengths:
        times_ms: list[list[float]] = [[] for _ in range(NUM_SIGHTS)]
        computed: list[list[int]] = [[] for _ in range(NUM_SIGHTS)]
        for _ in range(NUM_PREFIXES):
            prefix = bench.tokens(num_prefix)
            for sight in range(NUM_SIGHTS):
                answer = bench.answer([prefix + bench.tokens(SUFFIX_LEN)], 2)[0]
                times_ms[sight].append(1e3 * answer.first_token_s)
                computed[sight].append(num_prefix + SUFFIX_LEN - answer.num_cached_tokens)
        ttft_ms = [round(statistics.median(times), 3) for times in times_ms]
        table.append(
            {
                "prefix_tokens": num_prefix,
                "ttft_ms": ttft_ms,
                "computed_tokens": [round(statistics.median(counts)) for counts in computed],
                "cold_over_second": round(ttft_ms[0] / ttft_ms[1], 2),
            }
        )
        bench.write()


def chat(bench: PrefixBench) -> None:
    histories: list[list[int]] = [[] for _ in range(NUM_CHATS)]
    times_s: list[list[float]] = []
    computed, ideal = 0, 0
    for turn in range(NUM_TURNS):
        histories = [history + bench.tokens(QUESTION_LEN) for history in histories]
        answers = bench.answer(histories, ANSWER_LEN)
        computed += sum(
            len(history) - answer.num_cached_tokens
            for history, answer in zip(histories, answers, strict=True)
        )
        ideal += NUM_CHATS * (QUESTION_LEN + (turn > 0))
        times_s.append([answer.first_token_s for answer in answers])
        histories = [history + answer.token_ids for history, answer in zip(histories, answers, strict=True)]
        bench.report["chat"] = {
            "num_turns": turn + 1,
            "computed_tokens": computed,
            "ideal_tokens": ideal,
            "computed_over_ideal": round(computed / ideal, 4),
            "ttft_ms_mean": round(1e3 * statistics.fmean(itertools.chain(*times_s)), 3),
            "ttft_ms_by_turn": [round(1e3 * statistics.fmean(times), 2) for times in times_s],
        }
        bench.write()


def overhead(bench: PrefixBench) -> None:
    if not isinstance(bench.side, HeadwaySide) or bench.args.no_cache:
        return
    times = {
        name: [pair(bench, seconds) for _ in range(NUM_PAIRS)]
        for name, seconds in {"prefill": prefill_s, "decode": decode_s}.items()
    }
    bench.report["overhead"] = {
        name: {
            "with_cache_s": [round(with_s, 5) for with_s, _ in pairs],
            "opted_out_s": [round(out_s, 5) for _, out_s in pairs],
            "share": round(statistics.median(with_s / out_s for with_s, out_s in pairs) - 1, 5),
        }
        for name, pairs in times.items()
    }


def pair(bench: PrefixBench, seconds: Callable[[PrefixBench, bool], float]) -> tuple[float, float]:
    """With the cache, and without it before and after: what drifts falls out."""
    first_s, with_s, last_s = (seconds(bench, uses_cache) for uses_cache in (False, True, False))
    return with_s, (first_s + last_s) / 2


def prefill_s(bench: PrefixBench, uses_cache: bool) -> float:
    return generate_s(bench, [bench.tokens(COLD_LEN) for _ in range(NUM_COLD_PROMPTS)], 1, uses_cache)


def decode_s(bench: PrefixBench, uses_cache: bool) -> float:
    """Of one step, prompts taken off."""
    short_s, long_s = (
        generate_s(bench, [bench.tokens(PROMPT_LEN) for _ in range(NUM_ROWS)], num_new, uses_cache)
        for num_new in (SHORT_LEN, LONG_LEN)
    )
    return (long_s - short_s) / (LONG_LEN - SHORT_LEN)


def generate_s(bench: PrefixBench, prompts: list[list[int]], num_new: int, uses_cache: bool) -> float:
    from headway import SamplingParams

    assert isinstance(bench.side, HeadwaySide)
    bench.clock.check()
    begin_s = time.perf_counter()
    bench.side.llm.generate(list(prompts), greedy(SamplingParams, num_new), use_prefix_cache=uses_cache)
    return time.perf_counter() - begin_s


def cold(bench: PrefixBench) -> None:
    """Best of three."""
    num_tokens = max(bench.args.lengths)
    prefill = min(bench.answer([bench.tokens(num_tokens)], 1)[0].first_token_s for _ in range(3))

    def seconds(num_new: int) -> float:
        begin_s = time.perf_counter()
        bench.side.generate([bench.tokens(PROMPT_LEN) for _ in range(NUM_ROWS)], num_new)
        return time.perf_counter() - begin_s

    step_s = min((seconds(LONG_LEN) - seconds(SHORT_LEN)) / (LONG_LEN - SHORT_LEN) for _ in range(3))
    bench.report["cold"] = {
        f"ttft_ms_{num_tokens}": round(1e3 * prefill, 3),
        f"decode_step_ms_b{NUM_ROWS}": round(1e3 * step_s, 4),
    }


PARTS: dict[str, Callable[[PrefixBench], None]] = {
    "sights": sights,
    "chat": chat,
    "overhead": overhead,
    "cold": cold,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a file of bench/models (small, nano9b) or a checkpoint folder")
    parser.add_argument("--side", choices=SIDES, default="headway")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown", help="of the tree under test")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["sights", "chat", "overhead"])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--time-limit", type=float, default=300.0, metavar="S", help="for all of it")
    bench = PrefixBench(parser.parse_args())
    bench.run()
    bench.finish()


if __name__ == "__main__":
    main()
