"""The door: keys, hosts, header and body caps, slow senders, and HTTP that is none."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from headway.errors import ConfigError
from headway.server.endpoints import ENDPOINTS
from headway.server.settings import ServerSettings
from tests.server.fake_engine import FakeEngine
from tests.server.live import Live, live, read_all, wait_until

POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
KEY, OTHER_KEY = "sk-first-key", "sk-second-key"
FINE = {"prompt": "x", "max_tokens": 2}
PATHS = sorted({endpoint.path.replace("{model_id:path}", "fake") for endpoint in ENDPOINTS})
OPEN_PATHS = {"/", "/health", "/ready", "/ping"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Live]:
    with live(FakeEngine(), api_key=[KEY, OTHER_KEY], enable_dev_endpoints=True) as found:
        yield found


@pytest.fixture(scope="module")
def strict() -> Iterator[Live]:
    limits = {"max_header_bytes": 2048, "max_headers": 20, "max_body_bytes": 4096, "read_timeout_s": 0.4}
    with live(FakeEngine(), **limits, keep_alive_timeout_s=0.5, max_connections=32) as found:
        yield found


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_the_paths_are_the_ones_that_are_open() -> None:
    assert {endpoint.path for endpoint in ENDPOINTS if endpoint.is_open} == OPEN_PATHS


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
def test_without_the_key_nothing_is_answered(guarded: Live, path: str, method: str) -> None:
    for headers in (
        {},
        bearer("sk-wrong"),
        bearer(KEY + "x"),
        bearer(KEY[:-1]),
        {"authorization": KEY},
        bearer(""),
    ):
        answer = guarded.request(method, path, None, headers)
        if path in OPEN_PATHS:
            assert answer.status in (200, 405)
        else:
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/v1/../v1/models",
        "/health/../v1/models",
        "/health/",
        "/health;a",
        "/health%2f..%2fload",
        "/HEALTH",
        "/health%00",
        "/%76%31/models",
        "/v1/models?x=/health",
        "http://other/v1/models",
        "/ping/../load",
    ],
)
def test_another_spelling_opens_nothing(guarded: Live, path: str) -> None:
    reply = guarded.raw(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    assert reply.split(b" ")[1] in (b"401", b"400")


@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
def test_each_key_opens_all(guarded: Live, key: str) -> None:
    assert guarded.request("GET", "/v1/models", None, bearer(key)).status == 200
    assert guarded.request("POST", "/v1/completions", FINE, bearer(key)).status == 200
    assert guarded.request("GET", "/v1/models", None, {"authorization": f"bearer  {key} "}).status == 200


def test_a_key_divides_the_prefix_cache(guarded: Live) -> None:
    engine = guarded.client
    assert isinstance(engine, FakeEngine)
    for key, salt in ((KEY, None), (OTHER_KEY, None), (KEY, None), (KEY, "mine")):
        body = FINE if salt is None else {**FINE, "cache_salt": salt}
        guarded.request("POST", "/v1/completions", body, bearer(key))
    first, second, third, fourth = (request.cache_salt for request in engine.seen[-4:])
    assert first
    assert first == third
    assert first != second
    assert fourth == f"{first}/mine"
    assert KEY not in repr(engine.seen)


def test_no_key_is_shown(guarded: Live) -> None:
    assert KEY not in guarded.request("GET", "/server_info", None, bearer(KEY)).body.decode()


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-a\n\n sk-b \n")
    assert ServerSettings(api_key=["sk-c"], api_key_file=str(file)).all_keys() == ("sk-c", "sk-a", "sk-b")
    file.write_text("\n")
    with pytest.raises(ConfigError, match="api_key_file"):
        ServerSettings(api_key_file=str(file)).all_keys()
    with pytest.raises(ConfigError, match="cannot be read"):
        ServerSettings(api_key_file=str(tmp_path / "none")).all_keys()


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:80", 200), ("[::1]:8000", 200), ("LOCALHOST", 200), ("x.example", 403), ("", 403)],
)  # fmt: skip
def test_a_page_that_rebinds_its_name_is_not_answered(fake_server: Live, host: str, status: int) -> None:
    assert fake_server.get("/v1/models", host=host).status == status


def test_hosts_follow_the_address() -> None:
    assert ServerSettings(host="0.0.0.0").hosts is None
    assert ServerSettings(host="0.0.0.0", allowed_hosts=["api.example"]).hosts == ("api.example",)
    assert "127.0.0.1" in (ServerSettings().hosts or ())


def test_a_request_id_comes_back(fake_server: Live) -> None:
    answer = fake_server.post("/v1/completions", FINE, x_request_id="mine-7")
    assert answer.headers["x-request-id"] == "mine-7"
    assert answer.json["id"] == "cmpl-mine-7"
    assert fake_server.get("/nowhere").headers["x-request-id"]
    assert fake_server.get("/version", x_request_id="x" * 500).headers["x-request-id"] != "x" * 500


@pytest.mark.parametrize(
    "head",
    [b"x: " + b"a" * 3000, b"\r\n".join(b"x%d: a" % i for i in range(40)), b"cookie: " + b"b" * 60_000],
    ids=["long", "many", "longer than a read"],
)
def test_headers_are_bounded(strict: Live, head: bytes) -> None:
    reply = strict.raw(b"GET /version HTTP/1.1\r\nhost: localhost\r\n" + head + b"\r\n\r\n")
    assert not reply or reply.startswith(b"HTTP/1.1 431 ")
    assert strict.get("/version").status == 200


def test_a_long_url_is_a_long_header(strict: Live) -> None:
    assert strict.raw(b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n").startswith(
        b"HTTP/1.1 431 "
    )


@pytest.mark.parametrize("is_chunked", [False, True])
def test_the_body_is_bounded(strict: Live, is_chunked: bool) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    body = b"[" + b"1," * 4000
    if is_chunked:
        sent = head + b"transfer-encoding: chunked\r\n\r\n" + b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    else:
        sent = head + b"content-length: %d\r\n\r\n" % len(body) + body
    reply = strict.raw(sent)
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert json.loads(reply.split(b"\r\n\r\n")[1])["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b""),
        (b"GET /version HTT", b"408"),
        (b"GET /version HTTP/1.1\r\nhost: localhost\r\nx: ", b"408"),
        (POST + b"content-type: application/json\r\ncontent-length: 9\r\n\r\n{", b"408"),
    ],
)  # fmt: skip
def test_a_slow_sender_is_not_waited_for(strict: Live, sent: bytes, status: bytes) -> None:
    reply = strict.raw(sent)
    assert reply.split(b" ")[1:2] in ([status], [b"408"])


def test_an_idle_connection_is_closed(strict: Live) -> None:
    with strict.connect() as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b"200 OK" in read_all(sock)


def test_connections_are_bounded(strict: Live) -> None:
    socks = [strict.connect() for _ in range(60)]
    try:
        replies = [read_all(sock) for sock in socks]
    finally:
        for sock in socks:
            sock.close()
    assert sum(reply.startswith(b"HTTP/1.1 503 ") for reply in replies) >= 20
    assert strict.get("/version").status == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n",
        POST + b"content-length: -1\r\n\r\n",
        POST + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"GET / HTTP/1.1\r\nhost : localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n x: y\r\n\r\n",
        b"GET / HTTP/1.1\nhost:\x00\n\n",
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_http_is_told_so(fake_server: Live, sent: bytes) -> None:
    reply = fake_server.raw(sent, timeout_s=3)
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_browser_may_call_from_where_it_is_told_to() -> None:
    ask = {"origin": "https://app.example", "access-control-request-method": "POST"}
    with live(FakeEngine(), allowed_origins=["https://app.example"]) as server:
        answer = server.request("OPTIONS", "/v1/completions", None, ask)
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        other = server.request("OPTIONS", "/v1/completions", None, {**ask, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_browser_asks_before_it_brings_its_key_and_may_read_a_refusal() -> None:
    page = {"origin": "https://app.example"}
    with live(FakeEngine(), allowed_origins=["https://app.example"], api_key=["right"]) as server:
        preflight = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        answer = server.request("OPTIONS", "/v1/completions", None, {**page, **preflight})
        assert answer.status == 200
        assert answer.headers["access-control-allow-headers"] == "authorization"
        refusal = server.request("GET", "/v1/models", None, page)
        assert refusal.status == 401
        assert refusal.headers["access-control-allow-origin"] == page["origin"]
        reply = server.request("GET", "/v1/models", None, {**page, **bearer("right")})
        assert reply.status == 200
        assert "x-request-id" in reply.headers["access-control-expose-headers"]


def test_a_probe_without_a_host_is_answered_and_a_browser_without_one_is_not(fake_server: Live) -> None:
    assert fake_server.raw(b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")
    close = b"connection: close\r\n\r\n"
    assert fake_server.raw(b"GET /health HTTP/1.1\r\n" + close).startswith(b"HTTP/1.1 403")
    evil = b"GET /health HTTP/1.0\r\nhost: evil.example\r\n\r\n"
    assert fake_server.raw(evil).startswith(b"HTTP/1.1 403")


def test_one_id_may_be_given_to_several_requests_at_once() -> None:
    """A proxy that tries again sends the id that it sent before."""
    engine = FakeEngine()
    engine.may_go.clear()
    with live(engine) as server:
        statuses: list[int] = []

        def ask() -> None:
            statuses.append(server.post("/v1/completions", FINE, x_request_id="same").status)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(engine.live) == 3)
        server.on_loop(engine.may_go.set)
        for thread in threads:
            thread.join()
    assert statuses == [200] * 3


def test_pipelined_requests_are_answered_in_order(fake_server: Live) -> None:
    one = b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n"
    two = b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    reply = fake_server.raw(one * 3 + two)
    assert [part[:3] for part in reply.split(b"HTTP/1.1 ")[1:]] == [b"200"] * 3 + [b"404"]


def test_head_gets_the_head_alone_and_keeps_its_connection(guarded: Live) -> None:
    with guarded.connect(1.0) as sock:
        for _ in range(2):
            sock.sendall(b"HEAD /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            got = sock.recv(65536)
            assert got.startswith(b"HTTP/1.1 200")
            assert got.endswith(b"\r\n\r\n")


def test_whoever_asks_before_sending_a_body_is_told_to_go_on(strict: Live) -> None:
    body = json.dumps(FINE).encode()
    head = b"content-type: application/json\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(body)
    with strict.connect(2.0) as sock:
        sock.sendall(POST + head)
        assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_body_that_an_answer_did_not_wait_for_may_stay_out(strict: Live) -> None:
    """The connection ends, and nothing more is said that could be taken for another answer."""
    got = strict.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{", timeout_s=5.0)
    assert got.startswith(b"HTTP/1.1 200")
    assert got.count(b"HTTP/1.1") == 1
