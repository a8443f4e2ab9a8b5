"""Models, health, load, and what the server is: nothing here waits for the engine to finish anything."""

from __future__ import annotations

import dataclasses
from typing import Any

from headway import __version__
from headway.server.calls import Call, Reply, json_reply
from headway.server.errors import ApiError
from headway.server.schemas.admin import (
    HealthResponse,
    LoadResponse,
    ModelCard,
    ModelList,
    ProfileResponse,
    ResetResponse,
    ServerInfo,
    VersionResponse,
)

_SECRETS = frozenset({"api_key", "api_key_file"})


async def list_models(call: Call, _: None) -> Reply:
    return json_reply(ModelList([_card(call, name) for name in call.state.names]))


async def get_model(call: Call, _: None) -> Reply:
    name = call.scope["path_params"]["model_id"]
    if not name:
        raise ApiError("not_found", "there is no such path")
    return json_reply(_card(call, call.state.check_model(name)))


def _card(call: Call, name: str) -> ModelCard:
    state = call.state
    return ModelCard(name, state.created_s, root=state.names[0], max_model_len=state.info.max_model_len)


async def health(call: Call, _: None) -> Reply:
    """Whether the engine lives and moves: a supervisor may restart what is not healthy."""
    return await _health_reply(call, await call.state.why_not_healthy())


async def ready(call: Call, _: None) -> Reply:
    """Whether requests are taken: a router may send elsewhere what this server would refuse."""
    return await _health_reply(call, await call.state.why_not_ready())


async def _health_reply(call: Call, reason: str) -> Reply:
    progress_s = (await call.state.client.health()).seconds_since_progress
    status = 503 if reason else 200
    reply = json_reply(HealthResponse("unavailable" if reason else "ok", reason, progress_s), status)
    if reason:
        reply.headers["retry-after"] = "5"
    return reply


async def version(call: Call, _: None) -> Reply:
    return json_reply(VersionResponse(__version__))


async def load(call: Call, _: None) -> Reply:
    state = call.state
    stats = await state.client.stats()
    return json_reply(
        LoadResponse(
            server_load=len(state.open_calls),
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_paused=stats.num_paused,
            num_queued_prompt_tokens=state.gate.num_queued_tokens,
            kv_blocks_free=stats.blocks_free,
            kv_blocks_total=stats.blocks_total,
            state_slots_free=stats.slots_free,
            state_slots_total=stats.slots_total,
            is_draining=state.is_draining,
        )
    )


async def server_info(call: Call, _: None) -> Reply:
    state = call.state
    model = dataclasses.asdict(state.info)
    engine_settings = model.pop("settings")
    settings: dict[str, Any] = dataclasses.asdict(state.settings)
    for name in _SECRETS:
        settings.pop(name)
    return json_reply(ServerInfo(__version__, model, engine_settings, settings))


async def reset_prefix_cache(call: Call, _: None) -> Reply:
    return json_reply(ResetResponse(await call.state.client.reset_prefix_cache()))


async def start_profile(call: Call, _: None) -> Reply:
    await call.state.client.start_profile()
    return json_reply(ProfileResponse())


async def stop_profile(call: Call, _: None) -> Reply:
    """The record itself, for ui.perfetto.dev: no file is written on the server."""
    return Reply((await call.state.client.stop_profile()).encode())


async def openapi(call: Call, _: None) -> Reply:
    document = call.scope["app"].state.openapi
    if not document:
        raise ApiError("not_found", "there is no such path")
    return Reply(document)
