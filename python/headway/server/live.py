"""What goes on right now: `/metrics` for Prometheus, `/live` for the page at `/`, and that page."""

from __future__ import annotations

import time
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST

from headway.outputs import StepSpan
from headway.server.calls import Call, Reply, json_reply
from headway.server.exposition import Seen, exposition
from headway.server.metrics import METRICS, kv_blocks, state_slots
from headway.server.metrics_vllm import VLLM_METRICS
from headway.server.schemas.live import LiveResponse, LiveStep, Pool

PAGE = Path(__file__).with_name("page.html").read_bytes()
# The page brings all it needs and talks to this server alone.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


async def metrics(call: Call, _: None) -> Reply:
    seen = await _seen(call)
    groups = [(METRICS, dict[str, str]())]
    if call.state.settings.vllm_metrics:
        groups.append((VLLM_METRICS, {"model_name": seen.name, "engine": "0"}))
    return Reply(exposition(groups, seen), content_type=CONTENT_TYPE_LATEST.encode())


async def page(call: Call, _: None) -> Reply:
    """Says nothing of the engine itself: what it shows, it asks `/live` for, with a key where one is needed."""
    return Reply(PAGE, headers=dict(PAGE_HEADERS), content_type=b"text/html; charset=utf-8")


async def live(call: Call, _: None) -> Reply:
    seen, spans = await _seen(call), await call.state.client.recent_steps()
    stats = seen.stats
    return json_reply(
        LiveResponse(
            model=seen.name,
            device=seen.info.device,
            time_s=time.perf_counter(),
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_steps_in_flight=stats.steps_launched - stats.steps_committed,
            num_output_tokens_total=stats.num_output_tokens_total,
            num_looked_up_tokens_total=stats.prefix_cache.num_prompt_tokens,
            num_cached_tokens_total=stats.prefix_cache.num_cached_tokens,
            device_busy_s=stats.device_busy_s,
            device_idle_s=stats.device_idle_s,
            kv_blocks=Pool(**kv_blocks(seen)),
            state_slots=Pool(**state_slots(seen)),
            steps=_steps(spans),
        )
    )


def _steps(spans: list[StepSpan]) -> list[LiveStep]:
    """Times count from the first of them: a browser's numbers hold no nanoseconds since 1970."""
    return [
        LiveStep(
            begin_us=(span.begin_ns - spans[0].begin_ns) / 1e3,
            end_us=(span.end_ns - spans[0].begin_ns) / 1e3,
            num_rows=span.num_rows,
            num_decode_rows=span.num_decode_rows,
            num_tokens=span.num_tokens,
        )
        for span in spans
    ]


async def _seen(call: Call) -> Seen:
    state = call.state
    return Seen(await state.client.stats(), state.meter, state.info, state.names[0], len(state.open_calls))
