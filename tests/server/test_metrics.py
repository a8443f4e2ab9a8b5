"""`/metrics`: it parses, every name of docs/metrics.md is there, counters move with requests, histograms count them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from headway.aio import AsyncLLM
from headway.server.meter import Buckets, RequestMeter, decades
from headway.server.metrics import METRICS
from headway.server.metrics_vllm import VLLM_METRICS
from headway.server.tables import METRIC_TABLES, renew
from tests.server.fake_engine import FakeEngine
from tests.server.live import Live, live, wait_until
from tests.server.test_lifecycle import posted

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()
Samples = dict[tuple[str, tuple[str, ...]], float]
HISTOGRAMS = [m.name for m in METRICS if m.kind == "histogram" and m.name.startswith("headway_request_")]


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[Live]:
    llm = AsyncLLM(tiny_model_dir, device="cpu", max_num_seqs=4, max_model_len=512)
    with live(llm, served_model_name=["tiny"], vllm_metrics=True) as found:
        yield found


def scraped(server: Live) -> Samples:
    """By name and the values of the labels, in the order of the labels' names."""
    answer = server.get("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.body.decode())
    return {
        (s.name, tuple(value for _, value in sorted(s.labels.items()))): s.value
        for family in families
        for s in family.samples
    }


def gained(after: Samples, before: Samples, name: str, *labels: str) -> float:
    return after[name, labels] - before.get((name, labels), 0.0)


def test_the_tables_are_the_codes() -> None:
    assert renew(PAGE) == PAGE, "run: python -m headway.server.tables docs/metrics.md"
    assert set(re.findall(r"<!-- table: ([\w ]+) -->", PAGE)) == set(METRIC_TABLES)


def test_queries_of_the_page_name_metrics_that_there_are(server: Live) -> None:
    names = {name for name, _ in scraped(server)}
    assert set(re.findall(r"\bheadway_\w+", PAGE.split("## What to watch")[1])) <= names


def test_every_metric_is_there_once_with_its_kind_and_help(server: Live) -> None:
    text = server.get("/metrics").body.decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(families) == {m.name for m in (*METRICS, *VLLM_METRICS)}
    for metric in (*METRICS, *VLLM_METRICS):
        family = families[metric.name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert family.samples
        for sample in family.samples if metric.name != "vllm:cache_config_info" else ():
            own = set(sample.labels) - {"le", "model_name", "engine"}
            assert own == ({metric.label} if metric.label else set())
    assert text.count("# TYPE") == len(families)


def test_counters_move_and_histograms_count_requests(server: Live) -> None:
    before = scraped(server)
    num_requests, num_tokens = 5, 7
    num_prompt_tokens = 0
    for i in range(num_requests):
        body = {"prompt": f"def f{i}(x):", "max_tokens": num_tokens, "ignore_eos": True, "stream": i % 2 == 0}
        answer = server.post("/v1/completions", body)
        assert answer.status == 200
        usage = server.post("/tokenize", {"prompt": body["prompt"]}).json["count"]
        num_prompt_tokens += usage
    after = scraped(server)
    assert gained(after, before, "headway_requests_finished_total", "length") == num_requests
    assert gained(after, before, "vllm:request_success_total", "0", "length", "tiny") == num_requests
    for name in (*HISTOGRAMS, "headway_time_to_first_token_seconds", "headway_time_per_output_token_seconds"):
        assert gained(after, before, f"{name}_count") == num_requests, name
        assert gained(after, before, f"{name}_bucket", "+Inf") == num_requests
    assert gained(after, before, "headway_output_tokens_total") == num_requests * num_tokens
    assert gained(after, before, "headway_request_output_tokens_sum") == num_requests * num_tokens
    assert gained(after, before, "headway_prompt_tokens_total") == num_prompt_tokens
    assert gained(after, before, "headway_request_prompt_tokens_sum") == num_prompt_tokens
    assert gained(after, before, "headway_steps_total") >= num_requests * num_tokens
    assert 0 < gained(after, before, "headway_inter_token_latency_seconds_count") <= 3 * (num_tokens - 1)
    assert gained(after, before, "headway_http_replies_total", "200") >= 2 * num_requests
    assert after["headway_requests_running", ()] == after["headway_http_requests_open", ()] == 0


def test_a_router_reads_how_much_the_cache_holds(server: Live) -> None:
    """What llm-d's endpoint picker asks for, under vLLM's name."""
    (line,) = re.findall(
        r"^vllm:cache_config_info\{(.*)\} 1\.0$", server.get("/metrics").body.decode(), re.MULTILINE
    )
    labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
    settings = server.get("/server_info").json["engine_settings"]
    assert labels["block_size"] == str(settings["block_size"])
    assert labels["num_gpu_blocks"] == str(server.get("/load").json["kv_blocks_total"])
    assert (labels["model_name"], labels["engine"]) == ("tiny", "0")


def test_what_requests_ask_for_is_counted(server: Live) -> None:
    before = scraped(server)
    assert server.post("/v1/completions", {"prompt": "x", "n": 2, "max_tokens": 30, "seed": 1}).status == 200
    after = scraped(server)
    assert gained(after, before, "vllm:request_params_n_sum", "0", "tiny") == 2
    assert gained(after, before, "vllm:request_params_max_tokens_sum", "0", "tiny") == 30


def test_pools_add_up_and_cached_prefixes_show(server: Live) -> None:
    before = scraped(server)
    body = {"prompt": "def area(w, h):\n    return w * h\n" * 5, "max_tokens": 3}
    for _ in range(2):
        assert server.post("/v1/completions", body).status == 200
    after = scraped(server)
    for pool in ("headway_kv_blocks", "headway_state_slots"):
        parts = {labels[0]: value for (name, labels), value in after.items() if name == pool}
        assert sum(parts.values()) == after[f"{pool}_capacity", ()]
        assert parts["used"] == 0
        assert parts["cached"] > 0
    num_snapshots = after["headway_state_slots", ("cached",)]
    assert after["headway_snapshot_bytes", ()] > 10_000 * num_snapshots
    assert gained(after, before, "headway_prefix_lookups_total", "hit") == 1
    assert gained(after, before, "headway_cached_tokens_total") > 16
    assert gained(after, before, "vllm:prefix_cache_hits_total", "0", "tiny") == gained(
        after, before, "headway_cached_tokens_total"
    )
    lookups = sum(v for (name, _), v in after.items() if name == "headway_prefix_lookups_total")
    assert lookups == sum(v for (name, _), v in after.items() if name == "headway_requests_finished_total")


def test_refused_left_and_failed_requests_are_told_apart() -> None:
    with live(FakeEngine(max_live=1, step_s=0.005)) as server:
        assert not [name for name, _ in scraped(server) if name.startswith("vllm:")]
        with server.connect() as sock:
            sock.sendall(posted({"prompt": "x", "max_tokens": 2000, "stream": True}))
            assert sock.recv(100)
            assert server.post("/v1/completions", {"prompt": "y"}).status == 503
        wait_until(lambda: scraped(server)["headway_requests_finished_total", ("abort",)] == 1)
        engine = server.client
        assert isinstance(engine, FakeEngine)
        engine.num_steps_before_fault = 2
        server.post("/v1/completions", {"prompt": "z", "max_tokens": 4})
        found = scraped(server)
        assert found["headway_requests_finished_total", ("refused",)] == 1
        assert found["headway_requests_finished_total", ("error",)] == 1
        assert found["headway_requests_finished_total", ("stop",)] == 0
        assert found["headway_http_replies_total", ("503",)] == 2


def test_a_key_is_asked_for() -> None:
    with live(FakeEngine(), api_key=["secret"]) as server:
        assert server.get("/metrics").status == 401
        assert server.get("/metrics", authorization="Bearer secret").status == 200


def test_buckets_hold_their_upper_bound() -> None:
    buckets = Buckets(decades(-1, 1))
    assert buckets.bounds == (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    buckets.add(0.1)
    buckets.add(0.11, count=3)
    buckets.add(11.0)
    assert buckets.counts == [1, 3, 0, 0, 0, 0, 0, 1]
    assert buckets.count == 5
    assert buckets.total == pytest.approx(11.43)
    assert all(name in RequestMeter().ends for name in ("stop", "length", "abort", "error", "refused"))
