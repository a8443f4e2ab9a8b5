"""What bench/engine.py and bench/prefix.py share: one engine, prompts of random tokens, and a report made part by part.

It knows no part. The report is written after each: a run that is cut short, or a part that fails, keeps what the others
gave.
"""

from __future__ import annotations

import argparse
import json
import random
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench.sides import SIDES, Clock, OutOfTimeError, Side, SideOptions


class SideBench:
    """args: model, load_format, side, out, commit and time_limit of the command line."""

    def __init__(self, args: argparse.Namespace, options: SideOptions, seed: int) -> None:
        self.args = args
        self.draws = random.Random(seed)
        self.clock = Clock(args.time_limit)
        self.side: Side = SIDES[args.side](options)
        self.report: dict[str, Any] = {
            "commit": args.commit,
            "model": args.model,
            "load_format": args.load_format,
            "has_prefix_cache": options.has_prefix_cache,
            "torch": torch.__version__,
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            **self.side.describe(),
            "startup_s": round(self.clock.elapsed_s, 2),
            "cut_short": [],
            "failed": {},
            "part_s": {},
        }

    def run_parts(self, parts: Iterable[tuple[str, Callable[[], object]]]) -> None:
        for name, part in parts:
            begin_s = self.clock.elapsed_s
            try:
                part()
            except OutOfTimeError:
                self.report["cut_short"].append(name)
            except Exception as fault:  # the other parts may still be well
                traceback.print_exc()
                self.report["failed"][name] = repr(fault)
            self.report["part_s"][name] = round(self.clock.elapsed_s - begin_s, 1)
            self.write()

    def tokens(self, num_tokens: int) -> list[int]:
        """A prompt that shares nothing with any other."""
        return [self.draws.randrange(10, self.side.vocab_size - 10) for _ in range(num_tokens)]

    def write(self) -> None:
        if self.args.out:
            self.args.out.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")

    def finish(self) -> None:
        self.write()
        print(json.dumps(self.report))
        self.side.close()
