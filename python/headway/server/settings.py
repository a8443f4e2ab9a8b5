"""The server's settings, declared once: flags, their checks and the table in docs/serving.md come from here."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headway.config import MIB, config_error
from headway.errors import ConfigError
from headway.fields import refuse_values, setting

TOOL_PARSERS = (
    "auto",
    "none",
    "granite",
    "hermes",
    "llama3_json",
    "nemotron_json",
    "pythonic",
    "qwen3_coder",
)
REASONING_PARSERS = ("auto", "none", "granite", "think")


@dataclass(frozen=True)
class ServerSettings:
    """How `headway serve` listens, whom it answers and what it refuses.

    Raises ConfigError naming the setting, its value and its limit.
    """

    host: str = setting("127.0.0.1", kind="str", help="address to listen on; 0.0.0.0 is every interface")
    port: int = setting(8000, kind="int", low=0, high=65535, help="to listen on; 0 takes a free one")
    served_model_name: Sequence[str] | None = setting(
        None,
        kind="list",
        help="name clients call the model by; may be given several times; unset: the MODEL argument",
    )
    api_key: Sequence[str] | None = setting(
        None,
        kind="list",
        help="key that clients must bring; may be given several times; unset: anyone may ask",
    )
    api_key_file: str | None = setting(
        None, kind="str", help="file with one key a line, where a command line would show them to other users"
    )
    max_num_queued_reqs: int | None = setting(
        None,
        kind="int",
        low=0,
        high=2**20,
        help="completions that may wait beyond those that run; more get 503; unset: no limit",
    )
    max_num_queued_tokens: int | None = setting(
        None,
        kind="tokens",
        low=1,
        high=2**40,
        unit="tokens",
        help="prompt tokens that may wait for their first output; more get 503; unset: no limit",
    )
    max_num_reqs_per_key: int | None = setting(
        None,
        kind="int",
        low=1,
        high=2**20,
        help="requests of one key at a time; more get 429; unset: no limit",
    )
    shutdown_timeout_s: float = setting(
        30.0,
        kind="float",
        low=0,
        high=86400,
        help="how long SIGTERM waits for running requests before it ends them",
    )
    tool_call_parser: str = setting(
        "auto",
        kind="str",
        choices=TOOL_PARSERS,
        help="how the model writes tool calls; auto: read off its template",
    )
    reasoning_parser: str = setting(
        "auto", kind="str", choices=REASONING_PARSERS, help="how the model marks reasoning; auto: as above"
    )
    chat_template: str | None = setting(
        None, kind="str", help="file with a Jinja template to use in place of the checkpoint's"
    )
    allowed_hosts: Sequence[str] | None = setting(
        None,
        kind="list",
        tier="advanced",
        help="Host header to answer; may be given several times; unset: loopback names when listening on loopback, "
        "else any",
    )
    allowed_origins: Sequence[str] | None = setting(
        None, kind="list", tier="advanced", help="web origin that browsers may call from; unset: none"
    )
    max_connections: int = setting(
        4096, kind="int", low=1, high=2**20, tier="advanced", help="open at a time; further ones are closed"
    )
    max_body_bytes: int = setting(
        16 * MIB, kind="bytes", low=1024, high=2**30, unit="bytes", tier="advanced", help="of one request"
    )
    max_header_bytes: int = setting(
        16 * 1024,
        kind="bytes",
        low=1024,
        high=MIB,
        unit="bytes",
        tier="advanced",
        help="of one request, in all",
    )
    max_headers: int = setting(
        100, kind="int", low=8, high=10_000, tier="advanced", help="header lines of one request"
    )
    max_num_prompts: int = setting(
        1024, kind="int", low=1, high=2**16, tier="advanced", help="prompts of one request, times n"
    )
    read_timeout_s: float = setting(
        10.0,
        kind="float",
        low=0.1,
        high=3600,
        tier="advanced",
        help="for a client to send its headers, and its body",
    )
    send_timeout_s: float = setting(
        60.0,
        kind="float",
        low=0.1,
        high=3600,
        tier="advanced",
        help="for a client to take what was written to it; then it is cut off and its request ended",
    )
    keep_alive_timeout_s: float = setting(
        5.0, kind="float", low=0.1, high=3600, tier="advanced", help="that an idle connection stays open"
    )
    stall_timeout_s: float = setting(
        60.0,
        kind="float",
        low=0.1,
        high=86400,
        tier="advanced",
        help="without a finished step while requests run, after which /health answers 503",
    )
    engine_in_process: bool = setting(
        False,
        kind="bool",
        tier="advanced",
        help="run the engine in the server's own process, without watchdog",
    )
    watchdog_timeout_s: float = setting(
        120.0,
        kind="float",
        low=0.1,
        high=86400,
        tier="advanced",
        help="without a finished step while requests run, after which stacks are logged and the server ends",
    )
    heartbeat_timeout_s: float = setting(
        5.0,
        kind="float",
        low=0.5,
        high=86400,
        tier="advanced",
        help="without a sign of life from the engine's process, after which it is killed and the server ends",
    )
    enable_dev_endpoints: bool = setting(
        False,
        kind="bool",
        tier="advanced",
        help="offer /reset_prefix_cache, /start_profile and /stop_profile",
    )
    otlp_traces_endpoint: str | None = setting(
        None,
        kind="str",
        tier="advanced",
        help="URL of an OpenTelemetry collector, such as http://localhost:4318/v1/traces, that gets a span a request; "
        "unset: none are made",
    )
    vllm_metrics: bool = setting(
        False, kind="bool", tier="advanced", help="repeat /metrics under the names that vLLM has for them"
    )
    access_log: bool = setting(False, kind="bool", tier="advanced", help="one log line a request")

    def __post_init__(self) -> None:
        refuse_values(self, config_error)
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise config_error("otlp_traces_endpoint", endpoint, "a URL of http or https")
        for name in ("served_model_name", "api_key", "allowed_hosts", "allowed_origins"):
            for text in getattr(self, name) or ():
                if not isinstance(text, str) or not text:
                    raise config_error(name, text, "non-empty strings")

    def all_keys(self) -> tuple[str, ...]:
        """Every key that is accepted, those of the file among them. Raises ConfigError for a file without keys."""
        keys = list(self.api_key or ())
        if self.api_key_file is not None:
            try:
                lines = Path(self.api_key_file).read_text(encoding="utf-8").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"api_key_file (--api-key-file) cannot be read: {error}") from error
            read = [line.strip() for line in lines if line.strip()]
            if not read:
                raise config_error(
                    "api_key_file", self.api_key_file, "a file with one key a line, not an empty one"
                )
            keys += read
        return tuple(keys)

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Host names to answer, lower case; None: all. A page that rebinds its DNS name to 127.0.0.1 is not one."""
        if self.allowed_hosts is not None:
            return None if "*" in self.allowed_hosts else tuple(host.lower() for host in self.allowed_hosts)
        return ("localhost", "127.0.0.1", "[::1]", self.host.lower()) if is_loopback(self.host) else None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
