"""`headway bench`: reports with vLLM's keys whose numbers add up, and a load that arrives as it was asked for."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from headway.cli.bench.datasets import PrefixRepetition, RandomPrompts
from headway.cli.bench.load import Arrivals, latencies_ms, num_within, send_all, totals
from headway.cli.bench.openai_stream import Answer, _events
from headway.cli.main import build_parser, main
from headway.cli.pages import renew
from headway.cli.parser import parse

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
SMALL = ("--device", "cpu", "--max-model-len", "128")
NEEDS_SERVER = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("starlette", "httpx")), reason="extras"
)


def bench(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["bench", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_without_a_kind_it_is_a_latency() -> None:
    bare, named = (parse(build_parser(), ["bench", *kind, "--batch-size", "3"]) for kind in ([], ["latency"]))
    assert vars(bare) == vars(named)
    assert parse(build_parser(), ["bench"]).kind == "latency"


def test_the_tables_of_the_page_are_the_parsers() -> None:
    page = PAGE.read_text()
    assert renew(page) == page, "run: python -m headway.cli.pages docs/benchmarks.md"
    assert set(re.findall(r"<!-- flags: (\w+) -->", page)) == set(
        build_parser().subparsers["bench"].subparsers
    )


def test_a_latency_counts_its_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    sizes = ("--batch-size", "2", "--input-len", "5", "--output-len", "6", "--n", "2", "--num-iters", "2")
    report = bench(capsys, "latency", *SMALL, *sizes, "--output-json", str(file))
    assert report == json.loads(file.read_text())
    assert (report["num_requests"], report["total_num_tokens"]) == (4, 4 * (5 + 2 * 6))
    assert len(report["latencies"]) == 2
    assert report["avg_latency"] == statistics.fmean(report["latencies"])
    assert set(report["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert report["percentiles"]["50"] == pytest.approx(statistics.median(report["latencies"]))


@pytest.mark.parametrize("words", [("latency",), ("throughput", "--num-prompts", "2")])
def test_lengths_that_do_not_fit_are_refused(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words, *SMALL, "--input-len", "5", "--output-len", "300"]) == 2
    assert "must sum to at most 128 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("engine", [(), ("--async-engine",)])
def test_a_throughput_counts_its_requests(
    engine: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = (
        "--num-prompts",
        "5",
        "--random-input-len",
        "7",
        "--random-output-len",
        "4",
        "--random-prefix-len",
        "3",
    )
    report = bench(capsys, "throughput", *SMALL, *sizes, *engine)
    assert (report["num_requests"], report["total_num_tokens"]) == (5, 5 * (3 + 7 + 4))
    assert report["requests_per_second"] == pytest.approx(5 / report["elapsed_time"])
    assert report["tokens_per_second"] == pytest.approx(70 / report["elapsed_time"])


def test_a_start_is_measured_cold_and_warm(tiny_model_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    counts = ("--num-iters-cold", "1", "--num-iters-warmup", "0", "--num-iters-warm", "1")
    report = bench(capfd, "startup", *SMALL, *counts, "--model", str(tiny_model_dir))
    for phase in ("cold", "warm"):
        (startup_s,), (process_s,) = report[f"{phase}_startup_times"], report[f"{phase}_process_times"]
        assert 0 < report[f"avg_{phase}_startup_time"] == startup_s < process_s
        assert report[f"{phase}_startup_percentiles"]["99"] == startup_s


def test_a_start_that_fails_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "startup", "--model", str(tmp_path)]) == 1
    shown = capfd.readouterr().err
    assert "did not start" in shown
    assert "config.json" in shown
    assert "Traceback" not in shown


def test_prompts_are_as_long_as_asked_for_and_the_same_for_a_seed() -> None:
    lengths = RandomPrompts(input_len=100, output_len=20, range_ratio=0.5, prefix_len=4)
    prompts = lengths.draw(300, vocab_size=50, seed=3)
    assert prompts == lengths.draw(300, vocab_size=50, seed=3)
    assert prompts != lengths.draw(300, vocab_size=50, seed=4)
    assert len({tuple(prompt.token_ids[:4]) for prompt in prompts}) == 1
    sizes = {len(prompt.token_ids) - 4 for prompt in prompts}
    assert (min(sizes), max(sizes)) >= (50, 140)
    assert max(sizes) <= 150
    assert {prompt.output_len for prompt in prompts} <= set(range(10, 31))
    assert max(max(prompt.token_ids) for prompt in prompts) == 49
    assert lengths.longest == 4 + 150 + 30


def test_prompts_share_as_many_beginnings_as_asked_for() -> None:
    dataset = PrefixRepetition(prefix_len=6, suffix_len=3, num_prefixes=4, output_len=5)
    prompts = dataset.draw(40, vocab_size=1000, seed=3)
    assert prompts == dataset.draw(40, vocab_size=1000, seed=3)
    uses = Counter(tuple(prompt.token_ids[:6]) for prompt in prompts)
    assert list(uses.values()) == [10] * 4
    assert {(len(prompt.token_ids), prompt.output_len) for prompt in prompts} == {(9, 5)}
    assert dataset.longest == 14


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_their_mean_and_spread(burstiness: float) -> None:
    """Gaps of a gamma distribution of shape k: the mean is 1 / rate, the coefficient of variation 1 / sqrt(k)."""
    offsets_s = Arrivals(rate=50.0, burstiness=burstiness).offsets_s(20_000, seed=1)
    gaps_s = [b - a for a, b in pairwise(offsets_s)]
    mean_s = statistics.fmean(gaps_s)
    assert mean_s == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps_s) / mean_s == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)
    assert offsets_s == Arrivals(50.0, burstiness).offsets_s(20_000, seed=1)


def test_arrivals_at_once_and_with_a_growing_rate() -> None:
    assert set(Arrivals().offsets_s(10, seed=0)) == {0.0}
    for ramp in ("linear", "exponential"):
        offsets_s = Arrivals(ramp=ramp, ramp_rates=(10.0, 1000.0)).offsets_s(4000, seed=0)
        first, last = offsets_s[200] - offsets_s[0], offsets_s[-1] - offsets_s[-201]
        assert first > 8 * last


def test_no_more_at_once_than_allowed() -> None:
    num_open = most = 0

    async def ask() -> Answer:
        nonlocal num_open, most
        num_open += 1
        most = max(most, num_open)
        for _ in range(100):  # longer than all are sent in
            await asyncio.sleep(0)
        num_open -= 1
        return Answer(0.0, 1)

    for limit, expected in ((3, 3), (None, 20)):
        most = 0
        assert len(asyncio.run(send_all([ask] * 20, [0.0] * 20, limit))) == 20
        assert most == expected


def test_figures_are_what_their_definitions_say() -> None:
    one = Answer(10.0, 7, 4, 10.7, 0.1, [0.2, 0.2, 0.2])
    two = Answer(10.5, 5, 2, 11.0, 0.3, [0.2])
    lost = Answer(10.0, 9, 0, 10.1, error="503")
    found = totals([one, two, lost], 2.0)
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (12, 6)
    assert (found["request_throughput"], found["output_throughput"]) == (1.0, 3.0)
    assert found["total_token_throughput"] == 9.0
    assert found["max_concurrent_requests"] == 2
    assert found["max_output_tokens_per_s"] == pytest.approx(5.0)  # all of one, and the first of two
    times = latencies_ms([one, two, lost], ("ttft", "tpot", "itl", "e2el"), (50.0, 99.0))
    assert times["mean_ttft_ms"] == pytest.approx(200)
    assert times["mean_tpot_ms"] == pytest.approx(200)
    assert times["median_itl_ms"] == times["p50_itl_ms"] == pytest.approx(200)
    assert times["p99_e2el_ms"] == pytest.approx(698)
    assert times["std_ttft_ms"] == pytest.approx(100)
    assert num_within([one, two, lost], {"ttft": 200}) == 1
    assert num_within([one, two, lost], {"ttft": 400, "e2el": 600}) == 1
    assert num_within([one, two, lost], {"itl": 250}) == 2


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_are_found_wherever_the_network_cuts(size: int) -> None:
    sent = b': comment\n\ndata: {"a": 1}\n\ndata:{"a": 2}\n\ndata: [DONE]\n\ndata: {"a": 3}\n\n'

    async def pieces() -> AsyncIterator[bytes]:
        for begin in range(0, len(sent), size):
            yield sent[begin : begin + size]

    async def read() -> list[dict[str, Any]]:
        return [event async for event in _events(pieces())]

    assert asyncio.run(read()) == [{"a": 1}, {"a": 2}]


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    from tests.server.fake_engine import FakeEngine
    from tests.server.live import live

    with live(FakeEngine(step_s=0.001)) as server:
        yield server.url


@NEEDS_SERVER
@pytest.mark.parametrize("backend", ["openai", "vllm", "openai-chat"])
def test_a_server_is_measured(
    base_url: str, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--num-prompts", "12", "--random-input-len", "9", "--random-output-len", "5")
    words = ("--base-url", base_url, "--backend", backend, "--request-rate", "400", "--max-concurrency", "4")
    more = ("--num-warmups", "2", "--goodput", "e2el:60000", "--save-detailed", "--result-dir", str(tmp_path))
    report = bench(capsys, "serve", *words, *sizes, *more)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == report
    assert file.name.startswith(f"{backend}-400.0qps-fake-")
    assert (report["completed"], report["failed"], report["model_id"]) == (12, 0, "fake")
    assert report["total_output_tokens"] == 12 * 5 == sum(report["output_lens"])
    assert report["total_input_tokens"] == sum(report["input_lens"]) >= 12 * 9
    assert 1 <= report["max_concurrent_requests"] <= 4
    assert report["request_goodput"] == pytest.approx(report["request_throughput"])
    assert all(len(gaps) == 4 for gaps in report["itls"])
    assert report["generated_texts"] == ["abcde"] * 12
    for name in ("ttft", "tpot", "itl", "e2el"):
        for kind in ("mean", "median", "std", "p99"):
            assert f"{kind}_{name}_ms" in report
    assert report["mean_ttft_ms"] <= report["mean_e2el_ms"]


@NEEDS_SERVER
def test_a_profile_is_recorded_meanwhile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.server.fake_engine import FakeEngine
    from tests.server.live import live

    words = ["--num-prompts", "3", "--profile", "--result-dir", str(tmp_path), "--random-input-len", "8"]
    with live(FakeEngine(), enable_dev_endpoints=True) as server:
        assert main(["bench", "serve", "--port", str(server.port), *words]) == 0
        path = Path(json.loads(capsys.readouterr().out)["profile"])
        assert path.parent == tmp_path
        assert json.loads(path.read_text())
    with live(FakeEngine()) as server:
        assert main(["bench", "serve", "--port", str(server.port), *words]) == 1
        assert "--enable-dev-endpoints" in capsys.readouterr().err


@NEEDS_SERVER
def test_failures_are_counted_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.server.fake_engine import FakeEngine
    from tests.server.live import live

    engine = FakeEngine(max_live=0)
    with live(engine) as server:
        words = ["bench", "serve", "--base-url", server.url, "--num-prompts", "3", "--random-input-len", "4"]
        assert main(words) == 1
        shown = capsys.readouterr()
        assert json.loads(shown.out)["failed"] == 3
        assert "503" in shown.err
        engine.max_live, engine.num_steps_before_fault = None, 2
        assert main(words) == 1  # told in the stream, after its first events
        assert "engine" in capsys.readouterr().err


@NEEDS_SERVER
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base-url", "http://127.0.0.1:9"], "no server answers"),
        (["--goodput", "speed:3"], "--goodput must be"),
        (["--goodput", "ttft:fast"], "--goodput must be"),
        (["--ramp-up-start-rps", "3"], "need --ramp-up-strategy"),
        (["--ramp-up-strategy", "linear"], "needs --ramp-up-start-rps"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *words]) == 2
    assert message in capsys.readouterr().err


@NEEDS_SERVER
def test_the_key_of_the_environment_is_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.server.fake_engine import FakeEngine
    from tests.server.live import live

    with live(FakeEngine(), api_key=["secret"]) as server:
        words = ["bench", "serve", "--base-url", server.url, "--num-prompts", "2", "--random-output-len", "2"]
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        assert main(words) == 2
        assert "401" in capsys.readouterr().err
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out)["completed"] == 2
