"""Runs a server around an engine until it is told to stop or the engine dies: sockets, signals, exit codes."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from types import FrameType

import uvicorn

from headway.errors import ConfigError
from headway.loop import run
from headway.server.app import build_app
from headway.server.client import EngineClient
from headway.server.protocol import LimitedProtocol
from headway.server.settings import ServerSettings
from headway.server.state import ServerState

logger = logging.getLogger("headway")

EXIT_OK, EXIT_ENGINE_DIED = 0, 1
CLOSE_TIMEOUT_S = 5.0  # for replies that are on their way when all is over
BACKLOG = 2048


def bind(settings: ServerSettings) -> socket.socket:
    """Takes the port without listening yet: a port in use is known before a model is loaded.

    Raises ConfigError where the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        message = f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}"
        raise ConfigError(message, hint="--host, --port") from error
    return sock


class HeadwayServer(uvicorn.Server):
    """A first signal drains, a second one ends at once."""

    def __init__(self, state: ServerState) -> None:
        settings = state.settings
        config = uvicorn.Config(
            build_app(state),
            http=LimitedProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_config=None,
            backlog=BACKLOG,
            timeout_keep_alive=settings.keep_alive_timeout_s,  # type: ignore[arg-type]  # a float does as well
            timeout_graceful_shutdown=int(CLOSE_TIMEOUT_S),
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # malformed requests are no news
        self.state = state
        self.exit_code = EXIT_OK
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks = [asyncio.ensure_future(self.state.watch()), asyncio.ensure_future(self._watch_death())]
        try:
            await super().serve(sockets)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Says where it listens once it does."""
        await super().startup(sockets)
        for sock in sockets or ():
            host, port = sock.getsockname()[:2]
            shown_host = f"[{host}]" if ":" in host else host
            logger.info("serving %s at http://%s:%d", ", ".join(self.state.names), shown_host, port)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        now_s = asyncio.get_running_loop().time()
        for connection in list(self.server_state.connections):
            connection.refuse_if_late(now_s)  # type: ignore[union-attr]  # all are of LimitedProtocol
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal, between any two instructions: only posts to the loop."""
        assert self._loop is not None
        if self.state.is_draining:
            self.should_exit = self.force_exit = True
        self._loop.call_soon_threadsafe(self.begin_drain, signal.Signals(sig).name)

    def begin_drain(self, why: str) -> None:
        if self.state.is_draining:
            return
        self.state.is_draining = True
        logger.info("%s: answering what is open, taking nothing more", why)
        self._tasks.append(asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        await self.state.drain()
        self.should_exit = True

    async def _watch_death(self) -> None:
        """Everybody who waits hears of it from the engine itself; then there is nothing left to do here."""
        await self.state.has_died.wait()
        logger.error("the engine has stopped: %s", (await self.state.client.health()).reason)
        self.exit_code = EXIT_ENGINE_DIED
        deadline_s = asyncio.get_running_loop().time() + CLOSE_TIMEOUT_S
        while self.state.open_calls and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(0.02)
        self.should_exit = True


def run_server(client: EngineClient, settings: ServerSettings, sock: socket.socket) -> int:
    """`serve` as all that its process does."""
    return run(serve(client, settings, sock))


async def serve(client: EngineClient, settings: ServerSettings, sock: socket.socket) -> int:
    """Answers until a signal or the engine's death. Closes the engine and returns the process's exit code."""
    state = ServerState(client, settings)
    server = HeadwayServer(state)
    try:
        await server.serve([sock])
    finally:
        state.close()
        await client.close()
    return server.exit_code
