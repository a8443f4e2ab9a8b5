"""Answers of a running OpenAI-compatible server, ours or another's, for `headway chat --url`. Needs no extra."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import IO, Any

from headway.errors import ConfigError, ServerError

TIMEOUT_S = 300.0  # between two pieces of an answer; the first may wait for others in the queue
MAX_ERROR_BYTES = 1 << 20


class ServerAnswers:
    """Streams answers to conversations.

    Args:
        url: of the API, such as http://127.0.0.1:8000/v1; without a path, /v1 is meant.
        model: None: the first that the server lists.
        api_key: sent as a bearer token where there is one.
        fields: of every request, beside model and messages.
    """

    def __init__(self, url: str, model: str | None, api_key: str | None, fields: dict[str, Any]) -> None:
        self._url = _api_url(url)
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._fields = {"model": model or self._first_model(), "stream": True, **fields}

    def stream(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """Pieces of the answer's text as they come. Leaving early closes the connection, which ends the answer.

        Raises ServerError.
        """
        body = json.dumps({**self._fields, "messages": messages}).encode()
        with self._reply("/chat/completions", body) as reply:
            for event in _events(reply):
                if "error" in event:
                    raise ServerError(_message(event))
                for choice in event.get("choices", ()):
                    if text := choice.get("delta", {}).get("content"):
                        yield str(text)

    def _first_model(self) -> str:
        with self._reply("/models", None) as reply:
            names = [str(card["id"]) for card in json.load(reply)["data"]]
        if not names:
            raise ServerError(f"{self._url} lists no model", hint="name one with --model-name")
        return names[0]

    @contextmanager
    def _reply(self, path: str, body: bytes | None) -> Iterator[IO[bytes]]:
        """Whatever goes wrong while it is read becomes a ServerError."""
        request = urllib.request.Request(self._url + path, data=body, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                yield reply
        except urllib.error.HTTPError as error:
            text = _error_text(error.read(MAX_ERROR_BYTES))
            raise ServerError(f"the server answers {error.code}: {text}") from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerError(f"no answer from {self._url}: {reason}") from error
        except (ValueError, TypeError, LookupError) as error:
            raise ServerError(f"what {self._url} answers is not OpenAI's protocol: {error!r}") from error


def _api_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"--url must be such as http://127.0.0.1:8000/v1, got {url!r}")
    return url.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"


def _events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """JSON of each event up to [DONE]."""
    for line in lines:
        data = line.strip().removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        if data and not data.startswith(b":"):
            yield json.loads(data)


def _error_text(body: bytes) -> str:
    try:
        return _message(json.loads(body))
    except ValueError:
        return body[:300].decode(errors="replace")


def _message(document: Any) -> str:
    error = document.get("error", document) if isinstance(document, dict) else document
    return str(error.get("message", error) if isinstance(error, dict) else error)
