"""Malformed requests, many at a time: each gets a 4xx in the envelope or nothing, and the server is as it was."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from headway.aio import AsyncLLM
from tests.server.fake_engine import FakeEngine
from tests.server.live import Live, live, read_all, wait_until
from tests.server.malformed import malformed
from tests.server.scorecard import held_bytes, num_open_files, record

NUM_CONNECTIONS = 64
GROWTH_LIMIT_BYTES = 20 * 2**20
LEAKS = re.compile(rb"Traceback|0x[0-9a-f]{6}|\.py|File \"|site-packages|object at")


def check_reply(reply: bytes) -> int:
    """Status of a reply that is as it should be; 0 for none."""
    if not reply:
        return 0
    head, _, body = reply.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    assert 400 <= status < 500, reply[:500]
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(body) < 2000
    assert not LEAKS.search(body), body
    return status


def ask(server: Live, sent: bytes) -> int:
    with server.connect(timeout_s=20) as sock:
        try:
            sock.sendall(sent)
        except ConnectionError:
            return 0
        return check_reply(read_all(sock))


def fuzz(server: Live, num_requests: int, seed: int) -> list[int]:
    def ask_one(index: int) -> int:
        return ask(server, malformed(random.Random(f"{seed} {index}")))

    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        return list(pool.map(ask_one, range(num_requests)))


@pytest.mark.parametrize("num_requests", [500, pytest.param(10_000, marks=pytest.mark.long)])
def test_malformed_requests_harm_nobody(model_server: Live, num_requests: int) -> None:
    assert isinstance(model_server.client, AsyncLLM)
    fuzz(model_server, max(200, num_requests // 5), seed=0)  # threads, their heaps and caches come into being
    num_before, begin_bytes = num_open_files(), held_bytes()
    statuses = fuzz(model_server, num_requests, seed=num_requests)
    grown_bytes = held_bytes() - begin_bytes
    assert grown_bytes < GROWTH_LIMIT_BYTES
    assert set(statuses) >= {400, 415, 431, 404}
    assert statuses.count(0) < num_requests / 5
    wait_until(lambda: num_open_files() <= num_before + 2)
    load = model_server.get("/load").json
    assert load["kv_blocks_free"] == load["kv_blocks_total"]
    assert load["state_slots_free"] == load["state_slots_total"]
    assert load["server_load"] == load["num_queued_prompt_tokens"] == 0
    assert model_server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status == 200
    if num_requests == 10_000:
        replies = {str(status): count for status, count in sorted(Counter(statuses).items())}
        record("H1 malformed requests", num_requests=num_requests, replies=replies, grown_bytes=grown_bytes)


def test_a_fault_of_the_server_would_be_seen() -> None:
    """The check's own check: an engine that breaks on everything, asked something that is right."""

    class Broken(FakeEngine):
        def stream(self, request):  # type: ignore[no-untyped-def]
            raise ZeroDivisionError("/secret/path.py")

    body = b'{"prompt": "x"}'
    sent = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    with live(Broken()) as server, pytest.raises(AssertionError, match="500"):
        ask(server, sent + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    with pytest.raises(AssertionError):
        check_reply(
            b'HTTP/1.1 400 x\r\n\r\n{"error":{"message":"Traceback","type":"","param":null,"code":null}}'
        )
