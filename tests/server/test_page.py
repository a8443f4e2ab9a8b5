"""The page at `/`: it needs nothing but itself and `/live`, and `/live` says all that it reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from headway.aio import AsyncLLM
from headway.server.live import PAGE
from headway.server.schemas.live import LiveResponse, LiveStep, Pool
from tests.server.fake_engine import FakeEngine
from tests.server.live import Live, live

TEXT = PAGE.decode()
SCRIPT = TEXT.split("<script>")[1].split("</script>")[0]


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[Live]:
    llm = AsyncLLM(tiny_model_dir, device="cpu", max_num_seqs=4, max_model_len=512)
    with live(llm, served_model_name=["tiny"]) as found:
        yield found


def test_the_page_is_whole_in_itself() -> None:
    """Nothing is loaded but /live, and the policy that goes with the page would refuse it."""
    assert re.findall(r"\b(?:src|href)=\"([^\"]*)\"", TEXT) == ["data:,"]
    assert not re.findall(r"https?://|//\w|url\(|@import|\bimport\b", TEXT.replace("data:,", ""))
    assert re.findall(r"fetch\(\"(.*?)\"", SCRIPT) == ["live"]
    assert not re.findall(r"innerHTML|outerHTML|document\.write|eval|Function\(", SCRIPT)
    with live(FakeEngine()) as server:
        answer = server.get("/")
    assert answer.status == 200
    assert answer.body == PAGE
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy


def test_what_the_script_reads_is_there() -> None:
    """Every name after now., step. and pool. is a field, and every element it asks for is on the page."""
    for word, kind in (("now", LiveResponse), ("step", LiveStep), ("pool", Pool)):
        read = set(re.findall(rf"\b{word}\.(\w+)", SCRIPT))
        assert read
        assert read <= set(kind.__struct_fields__), word
    ids = set(re.findall(r"\bid=\"([\w-]+)\"", TEXT))
    assert set(re.findall(r"\b(?:at|context)\(\"([\w-]+)\"", SCRIPT)) <= ids
    pools = set(re.findall(r"drawPool\(\"(\w+)\"", SCRIPT))
    assert pools | {f"{pool}-text" for pool in pools} <= ids
    colors = set(re.findall(r"color\(\"(\w+)\"", SCRIPT)) | set(re.findall(r"var\(--(\w+)\)", TEXT))
    for scheme in TEXT.split("@media (prefers-color-scheme: dark)")[:2]:
        assert colors <= set(re.findall(r"--(\w+): #", scheme))


def test_live_follows_requests(server: Live) -> None:
    before = msgspec.json.decode(server.get("/live").body, type=LiveResponse)
    body = {"prompt": "def area(w, h):\n    return w * h\n" * 4, "max_tokens": 20, "ignore_eos": True}
    for _ in range(2):
        assert server.post("/v1/completions", body).status == 200
    after = msgspec.json.decode(server.get("/live").body, type=LiveResponse)
    assert after.model == "tiny"
    assert after.time_s > before.time_s
    assert after.num_output_tokens_total - before.num_output_tokens_total == 40
    assert 0 < after.num_cached_tokens_total < after.num_looked_up_tokens_total
    assert (after.num_running, after.num_waiting, after.num_steps_in_flight) == (0, 0, 0)
    assert after.kv_blocks.used == after.state_slots.used == 0
    assert after.kv_blocks.cached > 0
    assert after.kv_blocks.free > 0
    assert len(after.steps) >= 40
    assert after.steps[0].begin_us == 0
    assert all(step.begin_us <= step.end_us for step in after.steps)
    assert all(one.end_us <= other.begin_us for one, other in pairwise(after.steps))
    prompts = [step for step in after.steps if step.num_tokens > step.num_decode_rows]
    assert len(prompts) == 2
    assert prompts[0].num_tokens > prompts[1].num_tokens > 0  # the second time most of it is cached


def test_the_page_is_open_and_what_it_shows_is_not() -> None:
    with live(FakeEngine(), api_key=["secret"]) as server:
        assert server.get("/").status == 200
        assert server.get("/live").status == 401
        assert server.get("/live", authorization="Bearer secret").status == 200
        assert server.get("//").status == 401
