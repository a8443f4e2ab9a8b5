"""What every endpoint of one server shares: the engine, the settings, who is being answered, whether it goes on."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from headway.errors import ConfigError, HeadwayError
from headway.server.admission import Gate
from headway.server.client import EngineClient, ModelInfo
from headway.server.errors import ApiError, unavailable
from headway.server.meter import RequestMeter
from headway.server.sampling import changed_fields
from headway.server.settings import ServerSettings
from headway.server.tracing import open_tracing
from headway.text import ChatTemplate, Tokenizer
from headway.text.parsers import OutputFormat, detect_format
from headway.text.tokenizer import LONG_TEXT_CHARS

logger = logging.getLogger("headway")
T = TypeVar("T")

SWEEP_INTERVAL_S = 0.5


class Connection(Protocol):
    """What carries an exchange: `scope["headway.connection"]`. `on_gone` is called when it is lost."""

    on_gone: Callable[[], None] | None

    @property
    def is_lost(self) -> bool: ...

    @property
    def is_full(self) -> bool:
        """So much waits to be taken by the client that no more should be written before `drain`."""
        ...

    async def drain(self) -> None:
        """Returns when it is not full any more, or lost."""
        ...

    def write_chunk(self, data: bytes) -> None:
        """A piece of a reply that has begun without a length. Without the layers around a reply, which an event need
        not pass; written to nobody where the connection is lost."""
        ...

    def cut(self) -> None:
        """Closes it at once; what was not sent yet is dropped. A request in it ends as if its client had gone."""
        ...


@dataclass(eq=False)
class OpenCall:
    """A generation that is being answered. `sending_since_s` is set while the client is not taking what was sent."""

    task: asyncio.Task[None]
    connection: Connection
    request_ids: list[str] = field(default_factory=list)
    sending_since_s: float | None = None
    is_gone: bool = False  # nobody reads the answer any more

    def leave(self) -> None:
        """The client has gone: ends the handler, and with it what it asked of the engine."""
        self.is_gone = True
        self.task.cancel()


class ServerState:
    """One server around one engine. Raises ConfigError for settings that contradict the model."""

    def __init__(self, client: EngineClient, settings: ServerSettings) -> None:
        self.client = client
        self.settings = settings
        self.info: ModelInfo = client.info
        self.default_params = changed_fields(self.info.default_params)
        self.gate = Gate(settings)
        self.meter = RequestMeter()
        self.created_s = int(time.time())
        self.names = tuple(settings.served_model_name or (self.info.model,))
        self.key_digests = tuple(hashlib.sha256(key.encode()).digest() for key in settings.all_keys())
        self.tokenizer: Tokenizer | None = client.tokenizer
        self.chat_template = self._read_template()
        source = self.chat_template.source if self.chat_template else ""
        self.output_format: OutputFormat = detect_format(
            source, tools=settings.tool_call_parser, reasoning=settings.reasoning_parser
        )
        endpoint = settings.otlp_traces_endpoint
        self.tracing = open_tracing(endpoint, self.names[0]) if endpoint is not None else None
        self.open_calls: set[OpenCall] = set()
        self.request_numbers = itertools.count()
        self.is_draining = False
        self.has_died = asyncio.Event()
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="headway-text")

    def _read_template(self) -> ChatTemplate | None:
        path = self.settings.chat_template
        if path is None:
            return self.client.chat_template
        try:
            source = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template (--chat-template) cannot be read: {error}") from error
        return ChatTemplate(source, self.tokenizer.special_tokens if self.tokenizer else None)

    def need_tokenizer(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ApiError("bad_request", "this model has no tokenizer: pass token ids", param)
        return self.tokenizer

    async def on_thread(self, num_chars: int, work: Callable[[], T]) -> T:
        """Runs work here where it is short and costs less than a thread's turn, else on a thread of the text pool."""
        if num_chars < LONG_TEXT_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def check_model(self, name: str | None) -> str:
        """The name to answer with; an empty one is the first. Raises ApiError 404 for a model that is not served."""
        if not name:
            return self.names[0]
        if name not in self.names:
            raise ApiError(
                "not_found", f"the model {name[:200]!r} is not served here", "model", "model_not_found"
            )
        return name

    def check_accepting(self) -> None:
        if self.is_draining:
            raise unavailable(
                "the server is shutting down", "shutting_down", self.settings.shutdown_timeout_s
            )
        if self.has_died.is_set():
            raise unavailable("the engine has stopped", "engine_dead", 5)

    async def why_not_ready(self) -> str:
        """Empty while requests are taken."""
        if self.is_draining:
            return "shutting down"
        health = await self.client.health()
        if health.is_ready:
            return self._stall(health.seconds_since_progress)
        return health.reason or "not ready"

    async def why_not_healthy(self) -> str:
        """Empty while the engine lives and moves."""
        health = await self.client.health()
        if not health.is_alive or self.has_died.is_set():
            return "the engine has stopped"
        return self._stall(health.seconds_since_progress)

    def _stall(self, seconds: float) -> str:
        return f"no step for {seconds:.0f} s" if seconds > self.settings.stall_timeout_s else ""

    async def watch(self) -> None:
        """Until cancelled: notices that the engine died, and cuts clients off that take nothing."""
        while True:
            if not (await self.client.health()).is_alive:
                self.has_died.set()
            oldest_s = time.monotonic() - self.settings.send_timeout_s
            for call in list(self.open_calls):
                if call.sending_since_s is not None and call.sending_since_s < oldest_s:
                    call.connection.cut()
            await asyncio.sleep(SWEEP_INTERVAL_S)

    async def drain(self) -> None:
        """Takes nothing more, waits for what runs, ends what is left at the deadline. Returns when all is answered."""
        self.is_draining = True
        if await self._all_answered(self.settings.shutdown_timeout_s):
            return
        logger.info("ending %d requests that outlast --shutdown-timeout-s", len(self.open_calls))
        for request_id in [name for call in self.open_calls for name in call.request_ids]:
            try:
                await self.client.abort(request_id)
            except HeadwayError:  # the engine is dead: its readers hear of it themselves
                break
        if not await self._all_answered(2.0):
            for call in list(self.open_calls):
                call.connection.cut()

    async def _all_answered(self, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while self.open_calls and time.monotonic() < deadline_s and not self.has_died.is_set():
            await asyncio.sleep(0.05)
        return not self.open_calls

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self.tracing is not None:
            self.tracing.close()
