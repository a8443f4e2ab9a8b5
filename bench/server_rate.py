"""What of an engine's offline rate arrives over HTTP: `headway bench throughput` beside `headway serve` under load.

    python -m bench.server_rate --model bench/models/small.json [--streams 256] [--output-json FILE]

Both run the same shape with random weights, the same prompts' lengths and as many rows. Every token has a text, so
that every output of the engine is an event of its stream. The load comes from a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.http_load import request_bytes, send_all
from bench.server import processor_s
from headway import __version__

FIRST_TOKEN = 10  # of prompts: below are special ones


@dataclass(frozen=True)
class Load:
    streams: int
    num_prompts: int
    input_len: int
    output_len: int
    vocab_size: int

    def requests(self, seed: int, *, is_stream: bool) -> list[bytes]:
        """Every prompt another, and others for each seed: nothing is found in a cache."""
        draws = random.Random(seed)
        common = {"max_tokens": self.output_len, "ignore_eos": True, "temperature": 0, "stream": is_stream}
        prompts = (
            [draws.randrange(FIRST_TOKEN, self.vocab_size) for _ in range(self.input_len)]
            for _ in range(self.num_prompts)
        )
        return [request_bytes({"prompt": prompt, **common}) for prompt in prompts]


def write_model(config: Path, folder: Path) -> int:
    """The shape, and a tokenizer in which every id is a word of its own. Returns its vocab_size."""
    shutil.copy(config, folder / "config.json")
    vocab_size = int(json.loads(config.read_text())["vocab_size"])
    words = Tokenizer(models.WordLevel({f"Ġw{i}": i for i in range(vocab_size)}, unk_token="Ġw0"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    words.save(str(folder / "tokenizer.json"))
    return vocab_size


def engine_flags(folder: Path, args: argparse.Namespace) -> list[str]:
    more = ["--device", args.device] if args.device else []
    rows, length = str(args.streams), str(args.max_model_len)
    common = ["--load-format", "dummy", "--max-num-seqs", rows, "--max-model-len", length]
    return ["--model", str(folder), *common, *more]


def offline(flags: Sequence[str], load: Load) -> float:
    """Output tokens a second."""
    lengths = ["--input-len", str(load.input_len), "--output-len", str(load.output_len)]
    command = [sys.executable, "-m", "headway", "bench", "throughput", *flags, *lengths]
    command += ["--num-prompts", str(load.num_prompts)]
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(json.loads(report.strip().splitlines()[-1])["output_tokens_per_second"])


@dataclass(frozen=True)
class Server:
    port: int
    pid: int
    engine_pid: int


@contextmanager
def served(flags: Sequence[str]) -> Iterator[Server]:
    """`headway serve`, until the block is left; it must then drain and end well."""
    command = [sys.executable, "-m", "headway", "serve", *flags, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        engine_pid = 0
        for line in process.stderr:
            if found := re.search(r"the engine runs in process (\d+)", line):
                engine_pid = int(found[1])
            if found := re.search(r"serving .*:(\d+)$", line.strip()):
                break
            print(line, end="", file=sys.stderr)
        assert found, "it ended without serving"
        yield Server(int(found[1]), process.pid, engine_pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def over_http(
    server: Server, load: Load, pool: ProcessPoolExecutor, seed: int, *, is_stream: bool
) -> dict[str, Any]:
    requests = load.requests(seed, is_stream=is_stream)
    before = processor_s(server.pid), processor_s(server.engine_pid)
    begin_s = time.perf_counter()
    answered = pool.submit(send_all, server.port, load.streams, requests).result()
    wall_s = time.perf_counter() - begin_s
    after = processor_s(server.pid), processor_s(server.engine_pid)
    assert {status: len(times) for status, times in answered.times_s.items()} == {200: load.num_prompts}
    num_tokens = load.num_prompts * load.output_len
    return {
        "output_tokens_a_second": round(num_tokens / wall_s),
        "wall_s": round(wall_s, 3),
        "server_cores": round((after[0] - before[0]) / wall_s, 2),
        "engine_cores": round((after[1] - before[1]) / wall_s, 2),
        **({"tokens_an_event": round(num_tokens / answered.num_events, 2)} if is_stream else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="config.json of a shape")
    parser.add_argument("--device")
    parser.add_argument("--streams", type=int, default=256, help="at a time")
    parser.add_argument("--num-prompts", type=int, default=2048)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--output-json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        vocab_size = write_model(args.model, Path(folder))
        load = Load(args.streams, args.num_prompts, args.input_len, args.output_len, vocab_size)
        report = {**measure(engine_flags(Path(folder), args), load), "versions": {"headway": __version__}}
    report["arguments"] = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name != "output_json"
    }
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


def measure(flags: Sequence[str], load: Load) -> dict[str, Any]:
    """The server warms up with as many requests as it has rows. Sittings of the engine alone, one before and one after,
    differ by a tenth or more, so the server's rate is a share of their mean.
    """
    before = offline(flags, load)
    report = over_server(flags, load)
    after = offline(flags, load)
    for found in report.values():
        found["share_of_offline"] = round(2 * found["output_tokens_a_second"] / (before + after), 3)
    return {"offline_output_tokens_a_second": [round(before), round(after)], **report}


def over_server(flags: Sequence[str], load: Load) -> dict[str, dict[str, Any]]:
    with served(flags) as server, ProcessPoolExecutor(1) as pool:
        warm_up = load.requests(0, is_stream=True)[: load.streams]
        pool.submit(send_all, server.port, load.streams, warm_up).result()
        ways = {"whole": False, "streamed": True, "streamed_again": True}
        return {
            name: over_http(server, load, pool, seed, is_stream=is_stream)
            for seed, (name, is_stream) in enumerate(ways.items(), 1)
        }


if __name__ == "__main__":
    main()
