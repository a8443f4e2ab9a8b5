"""`headway serve`: the OpenAI-compatible server."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from headway.cli.console import show_log, show_progress
from headway.cli.flags import add_engine_flags, add_flags, given
from headway.config import EngineConfig
from headway.errors import BuildError, ConfigError
from headway.server.settings import ServerSettings


def add_to(commands: Any, *, shows_all: bool) -> None:
    parser = commands.add_parser(
        "serve",
        help="answer OpenAI's clients over HTTP",
        description="An OpenAI-compatible server: headway serve MODEL --port 8000",
    )
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("--quiet", action="store_true", help="log errors alone")
    add_flags(parser.add_argument_group("server"), ServerSettings, shows_all=shows_all)
    add_engine_flags(parser, shows_all=shows_all)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Refuses bad settings, a missing extra and a port in use before a model is loaded."""
    show_log(logging.ERROR if args.quiet else logging.INFO)
    settings = ServerSettings(**given(args, ServerSettings))
    keywords = given(args, EngineConfig)
    model = args.positional_model or keywords.get("model")
    if model != keywords.setdefault("model", model):
        raise ConfigError("two models are given: MODEL and --model")
    EngineConfig(**keywords)
    settings.all_keys()
    bind, run_server = _serving()
    if settings.otlp_traces_endpoint is not None:
        from headway.server.tracing import require_packages

        require_packages()
    with bind(settings) as sock:
        return int(run_server(_start(settings, keywords), settings, sock))


def _start(settings: ServerSettings, keywords: dict[str, Any]) -> Any:
    """The engine, ready: in a process of its own unless told otherwise."""
    progress = show_progress if sys.stderr.isatty() else None
    options = {"progress": progress, "max_waiting": settings.max_num_queued_reqs, **keywords}
    if settings.engine_in_process:
        from headway.aio import AsyncLLM

        return AsyncLLM(**options)
    from headway.remote.client import RemoteEngine

    return RemoteEngine(
        **options,
        watchdog_timeout_s=settings.watchdog_timeout_s,
        heartbeat_timeout_s=settings.heartbeat_timeout_s,
    )


def _serving() -> tuple[Any, Any]:
    try:
        import zmq  # noqa: F401  # the engine's process is spoken to through it

        from headway.server.serve import bind, run_server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "headway":
            raise
        raise BuildError(f"{error.name} is not installed", hint="pip install 'headway[serve]'") from error
    return bind, run_server
