"""The doors: every request passes here before a route is looked up. Host, key, request id; nothing of what is asked.

Deny by default: with keys set, only the paths named as open are answered without one. The path compared is the one
that routes compare, so that another spelling of it is another path.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Awaitable, Callable

from headway.server.calls import MAX_ID_CHARS, Receive, Scope, Send, error_reply, new_id, send_reply
from headway.server.errors import ApiError
from headway.server.state import ServerState

logger = logging.getLogger("headway")

_ID_PATTERN = re.compile(rf"[\x21-\x7e]{{1,{MAX_ID_CHARS}}}")


App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Edge:
    """Around all else: the id of the request, which comes back on every reply, and the Host it may ask for."""

    def __init__(self, app: App, state: ServerState) -> None:
        self._app = app
        self._state = state
        self._hosts = state.settings.hosts
        self.settings = state.settings  # for the protocol below

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] != "http":
            return self._app(scope, receive, send)
        scope["headway.headers"] = headers = dict(scope["headers"])
        scope["headway.request_id"] = request_id = _request_id(headers.get(b"x-request-id"))
        send = self._named(scope, send, request_id)
        try:
            self._check_host(headers.get(b"host"), scope["http_version"])
        except ApiError as error:
            return send_reply(send, error_reply(error))
        return self._app(scope, receive, send)

    def _named(self, scope: Scope, send: Send, request_id: str) -> Send:
        """`send`, with X-Request-Id on every reply, and a log line where that is asked for."""
        name = request_id.encode()
        logs, replies = self._state.settings.access_log, self._state.meter.replies

        async def send_named(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start":
                replies[message["status"]] += 1  # type: ignore[index]
                message["headers"].append((b"x-request-id", name))  # type: ignore[attr-defined]
                if logs:
                    logger.info(
                        "%s %s %s %s", scope["method"], scope["path"][:200], message["status"], request_id
                    )
            await send(message)

        return send_named  # type: ignore[return-value]

    def _check_host(self, host: bytes | None, http_version: str) -> None:
        """Every browser names a Host; probes of load balancers, which speak HTTP/1.0, may have none."""
        if self._hosts is None or (host is None and http_version == "1.0"):
            return
        name, colon, port = (host or b"").rpartition(b":")
        if not colon or (port and not port.isdigit()):
            name = host or b""
        if name.decode("latin-1").lower() not in self._hosts:
            raise ApiError("forbidden_host", "this Host is not answered; see --allowed-hosts")


class KeyCheck:
    """Within what answers a browser's preflight, which brings no key: a refusal, too, is for the page to read."""

    def __init__(self, app: App, state: ServerState, open_paths: frozenset[str]) -> None:
        self._app = app
        self._digests = state.key_digests
        self._open_paths = open_paths

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http":
            authorization = scope["headway.headers"].get(b"authorization", b"")
            try:
                scope["headway.key_id"] = self._check(scope["path"], authorization)
            except ApiError as error:
                return send_reply(send, error_reply(error))
        return self._app(scope, receive, send)

    def _check(self, path: str, authorization: bytes) -> str:
        """Who asks: a digest that is no key. Compares with every key, in a time that tells nothing of them."""
        if not self._digests or path in self._open_paths:
            return ""
        scheme, _, key = authorization.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        num_equal = sum(hmac.compare_digest(given, digest) for digest in self._digests)
        if scheme.lower() != b"bearer" or not num_equal:
            raise ApiError(
                "unauthorized", "the API key is missing or wrong", headers={"www-authenticate": "Bearer"}
            )
        return hashlib.sha256(b"headway key id" + given).hexdigest()[:32]


def _request_id(given: bytes | None) -> str:
    """The caller's, where it is plain; it goes into a header and a log line."""
    text = (given or b"").decode("latin-1")
    return text if _ID_PATTERN.fullmatch(text) else new_id()
