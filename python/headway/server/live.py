"""What goes on right now: `/metrics` for Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST

from headway.server.calls import Call, Reply
from headway.server.exposition import Seen
from headway.server.metrics import metrics_page


async def metrics(call: Call, _: None) -> Reply:
    seen = await _seen(call)
    body = metrics_page(seen, with_vllm_names=call.state.settings.vllm_metrics)
    return Reply(body, content_type=CONTENT_TYPE_LATEST.encode())


async def _seen(call: Call) -> Seen:
    state = call.state
    return Seen(await state.client.stats(), state.meter, state.info, state.names[0], len(state.open_calls))
