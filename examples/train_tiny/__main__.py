"""Commands: `prepare` packs the corpus, `train` trains and evaluates, `overlap` and `card` describe."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from examples.train_tiny.settings import TrainSettings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.train_tiny", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="pack this Python's standard library into --corpus")
    train = commands.add_parser("train", help="train from --corpus, write the checkpoint to --out")
    overlap = commands.add_parser(
        "overlap", help="add to metrics.json how far held-out files repeat training files"
    )
    card = commands.add_parser("card", help="write README.md into --out from its metrics.json")
    for command in (prepare, train, overlap):
        command.add_argument("--corpus", type=Path, default=Path(".corpus"))
    for command in (train, overlap, card):
        command.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for setting in fields(TrainSettings):
        flag = "--" + setting.name.replace("_", "-")
        if isinstance(setting.default, bool):
            train.add_argument(flag, action=argparse.BooleanOptionalAction, default=setting.default)
        else:
            train.add_argument(flag, type=type(setting.default), default=setting.default)
    return parser


def main() -> None:
    args = _parser().parse_args()
    match args.command:
        case "prepare":
            from examples.train_tiny.corpus import prepare

            prepare(args.corpus)
        case "train":
            from examples.train_tiny.train import train

            settings = TrainSettings(**{f.name: getattr(args, f.name) for f in fields(TrainSettings)})
            train(args.corpus, args.out, settings, torch.device(args.device))
        case "overlap":
            from examples.train_tiny.overlap import measure_overlap

            measure_overlap(args.corpus, args.out)
        case "card":
            from examples.train_tiny.card import write_card

            write_card(args.out)


if __name__ == "__main__":
    main()
