"""Decode speed of Headway and of transformers' `generate`: same machine, weights and prompts; one process.

    python bench/decode_vs_transformers.py [--model FOLDER] [--batch-size 8] [--output-len 128]

Both run greedily on prompts of equal length with the end token ignored. The decode rate leaves the prompt out: it is
(output_len - 1) * batch_size tokens over the time that output_len tokens take beyond the time that one takes. Runs
alternate between the two and the median counts. Both run with one thread and with all; the ratio is between each one's
best, since on a busy machine a second thread costs more than it brings. The last line of stdout is the report, also
written to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from headway import LLM, SamplingParams, __version__, ops
from headway.engine.assemble import embedded_model

RESULTS = Path(__file__).parent / "results"
Generate = Callable[[int], list[list[int]]]  # output tokens -> token ids of each prompt


def main() -> None:
    args = parse_args()
    prompts = make_prompts(args)
    with LLM(args.model, device="cpu", max_num_seqs=args.batch_size, max_model_len=args.max_len) as llm:
        contenders = {
            "headway": headway_runner(llm, prompts),
            "transformers": transformers_runner(args.model, prompts),
        }
        agreement = count_agreement(contenders, args.output_len)
        rates = {num_threads: measure(contenders, args, num_threads) for num_threads in args.threads}
    write(make_report(args, rates, agreement), args.output_json)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=str(embedded_model()), help="checkpoint folder (the embedded model)"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--num-iters", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--output-json", default=str(RESULTS / "decode_vs_transformers.json"))
    args = parser.parse_args()
    args.max_len = args.input_len + args.output_len
    return args


def make_prompts(args: argparse.Namespace) -> list[list[int]]:
    """Different prompts of equal length, so that transformers needs no padding."""
    vocab_size = transformers.AutoConfig.from_pretrained(args.model).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab_size, (args.batch_size, args.input_len), generator=generator).tolist()


def headway_runner(llm: LLM, prompts: list[list[int]]) -> Generate:
    def generate(output_len: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    return generate


def transformers_runner(model_path: str, prompts: list[list[int]]) -> Generate:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    model.generation_config = (
        transformers.GenerationConfig()
    )  # the checkpoint's may bring penalties of its own
    input_ids = torch.tensor(prompts)
    attention_mask = torch.ones_like(input_ids)

    @torch.inference_mode()
    def generate(output_len: int) -> list[list[int]]:
        tokens = model.generate(
            input_ids,
            attention_mask=attention_mask,
            do_sample=False,
            min_new_tokens=output_len,
            max_new_tokens=output_len,
            pad_token_id=0,
        )
        return tokens[:, input_ids.shape[1] :].tolist()

    return generate


def count_agreement(contenders: dict[str, Generate], output_len: int) -> float:
    """Share of prompts whose whole outputs are equal; also the warm-up."""
    first, second = (generate(output_len) for generate in contenders.values())
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def measure(contenders: dict[str, Generate], args: argparse.Namespace, num_threads: int) -> dict[str, float]:
    """Decode tokens a second of each contender."""
    torch.set_num_threads(num_threads)
    ops.set_num_threads(num_threads)
    samples: dict[str, dict[int, list[float]]] = {name: {1: [], args.output_len: []} for name in contenders}
    for _ in range(args.num_iters):
        for name, generate in contenders.items():
            for output_len, seconds in samples[name].items():
                begin_s = time.perf_counter()
                generate(output_len)
                seconds.append(time.perf_counter() - begin_s)
    num_tokens = args.batch_size * (args.output_len - 1)
    return {name: num_tokens / decode_seconds(by_len) for name, by_len in samples.items()}


def decode_seconds(seconds_by_len: dict[int, list[float]]) -> float:
    """Median time of the long outputs less that of the outputs of one token."""
    return statistics.median(seconds_by_len[max(seconds_by_len)]) - statistics.median(seconds_by_len[1])


def make_report(
    args: argparse.Namespace, rates: dict[int, dict[str, float]], agreement: float
) -> dict[str, Any]:
    best = {name: max(by_name[name] for by_name in rates.values()) for name in ("headway", "transformers")}
    return {
        "model": Path(args.model).name,
        "dtype": "float32",
        **{name: getattr(args, name) for name in ("batch_size", "input_len", "output_len", "num_iters")},
        "decode_tokens_per_second_by_threads": rates,
        "best_decode_tokens_per_second": best,
        "ratio": best["headway"] / best["transformers"],
        "equal_outputs": agreement,
        "versions": {
            "headway": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": platform.machine(),
    }


def write(report: dict[str, Any], path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for num_threads, by_name in report["decode_tokens_per_second_by_threads"].items():
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in by_name.items())
        print(f"{num_threads} threads: {rates} decode tokens/s", file=sys.stderr)
    print(f"ratio of the best: {report['ratio']:.2f}", file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
