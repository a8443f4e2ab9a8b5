"""Models, health, load and what the server is."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class ModelCard(msgspec.Struct):
    """One name that requests may carry; all of them are the same model."""

    id: str
    created: int
    root: str
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "headway"
    parent: str | None = None
    permission: list[dict[str, Any]] = []


class ModelList(msgspec.Struct):
    """Every name."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class HealthResponse(msgspec.Struct):
    """reason is empty while all is well."""

    status: Literal["ok", "unavailable"]
    reason: str
    seconds_since_progress: float


class VersionResponse(msgspec.Struct):
    """Of Headway."""

    version: str


class LoadResponse(msgspec.Struct):
    """What a router needs to choose among servers."""

    server_load: int  # requests being answered
    num_running: int
    num_waiting: int
    num_paused: int
    num_queued_prompt_tokens: int
    kv_blocks_free: int
    kv_blocks_total: int
    state_slots_free: int
    state_slots_total: int
    is_draining: bool


class ServerInfo(msgspec.Struct):
    """Settings as resolved, without keys."""

    version: str
    model: dict[str, Any]
    engine_settings: dict[str, Any]
    server_settings: dict[str, Any]


class ResetResponse(msgspec.Struct):
    """False: prefixes of running requests stay."""

    is_reset: bool


class ProfileResponse(msgspec.Struct):
    """It is recording."""

    status: Literal["recording"] = "recording"
