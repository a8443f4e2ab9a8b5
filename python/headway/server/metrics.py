"""Every metric of Headway's own, once: `/metrics` and the tables in docs/metrics.md are made of these records.

All is read off counters that exist anyway, when somebody asks; asking costs the engine nothing and waits for nothing.
"""

from __future__ import annotations

from headway import __version__
from headway.server.exposition import Metric, Seen, Summary


def kv_blocks(seen: Seen) -> dict[str, int]:
    """Parts of the whole, by who has them; cached: nobody but cached prefixes, as good as free."""
    stats = seen.stats
    cached = stats.prefix_cache.num_evictable_blocks
    used = stats.blocks_total - stats.blocks_free - stats.blocks_fenced - cached
    return {"used": used, "cached": cached, "fenced": stats.blocks_fenced, "free": stats.blocks_free}


def state_slots(seen: Seen) -> dict[str, int]:
    """Parts of the whole; cached: snapshots of prefixes."""
    stats = seen.stats
    cached = stats.prefix_cache.num_snapshots
    used = stats.slots_total - stats.slots_free - stats.slots_fenced - cached
    return {"used": used, "cached": cached, "fenced": stats.slots_fenced, "free": stats.slots_free}


def _lookups(seen: Seen) -> dict[str, float]:
    cache = seen.stats.prefix_cache
    return {
        "hit": cache.num_hits,
        "too_short": cache.num_too_short,
        "pending": cache.num_pending,
        "without_snapshot": cache.num_without_snapshot,
        "other_salt": cache.num_other_salt,
        "without_kv": cache.num_without_kv,
    }


def _ways(num_out: int, num_back: int) -> dict[str, float]:
    return {"out": num_out, "back": num_back}


def _idle_share(seen: Seen) -> float:
    stats = seen.stats
    elapsed_s = stats.device_busy_s + stats.device_idle_s
    return stats.device_idle_s / elapsed_s if elapsed_s else 0.0


def kv_usage(seen: Seen) -> float:
    """The share of KV blocks that requests hold, 0 .. 1; those only cached prefixes hold are as good as free."""
    return kv_blocks(seen)["used"] / seen.stats.blocks_total if seen.stats.blocks_total else 0.0


METRICS: tuple[Metric, ...] = (
    Metric("headway_info", "gauge", "1, with Headway's version", lambda s: {__version__: 1}, "version"),
    Metric("headway_requests_running", "gauge", "Completions that hold a row", lambda s: s.stats.num_running),
    Metric("headway_requests_waiting", "gauge", "Completions in the queue", lambda s: s.stats.num_waiting),
    Metric("headway_requests_paused", "gauge", "Completions that are paused", lambda s: s.stats.num_paused),
    Metric("headway_http_requests_open", "gauge", "Generations being answered", lambda s: s.num_open_calls),
    Metric(
        "headway_requests_finished",
        "counter",
        "Completions that are over; abort: the client left or it was ended; refused: never begun",
        lambda s: s.requests.ends,
        "reason",
    ),
    Metric(
        "headway_http_replies",
        "counter",
        "HTTP replies by status",
        lambda s: {str(status): count for status, count in sorted(s.requests.replies.items())},
        "status",
    ),
    Metric(
        "headway_prompt_tokens", "counter", "Of requests taken", lambda s: s.stats.num_prompt_tokens_total
    ),
    Metric("headway_output_tokens", "counter", "Generated", lambda s: s.stats.num_output_tokens_total),
    Metric(
        "headway_cached_tokens",
        "counter",
        "Of prompts, found in the prefix cache",
        lambda s: s.stats.prefix_cache.num_cached_tokens,
    ),
    Metric(
        "headway_time_to_first_token_seconds",
        "histogram",
        "From a request's arrival in the engine to its first token",
        lambda s: s.requests.ttft_s,
    ),
    Metric(
        "headway_inter_token_latency_seconds",
        "histogram",
        "Between tokens of a streamed completion, as the server sends them",
        lambda s: s.requests.token_gap_s,
    ),
    Metric(
        "headway_time_per_output_token_seconds",
        "histogram",
        "A request's mean over its tokens after the first",
        lambda s: s.requests.tpot_s,
    ),
    Metric(
        "headway_request_queue_seconds",
        "histogram",
        "From a request's arrival in the engine to its row",
        lambda s: s.requests.queue_s,
    ),
    Metric(
        "headway_request_prefill_seconds",
        "histogram",
        "From its row to its first token",
        lambda s: s.requests.prefill_s,
    ),
    Metric(
        "headway_request_decode_seconds",
        "histogram",
        "From its first token to its end",
        lambda s: s.requests.decode_s,
    ),
    Metric("headway_request_seconds", "histogram", "From arrival to end", lambda s: s.requests.latency_s),
    Metric(
        "headway_request_prompt_tokens",
        "histogram",
        "Prompt tokens a request",
        lambda s: s.requests.num_prompt_tokens,
    ),
    Metric(
        "headway_request_output_tokens",
        "histogram",
        "Generated tokens a request, its completions together",
        lambda s: s.requests.num_output_tokens,
    ),
    Metric("headway_kv_blocks_capacity", "gauge", "KV blocks in all", lambda s: s.stats.blocks_total),
    Metric(
        "headway_kv_blocks",
        "gauge",
        "KV blocks: used by requests, cached alone, fenced until a step retires, free",
        kv_blocks,
        "state",
    ),
    Metric("headway_state_slots_capacity", "gauge", "State slots in all", lambda s: s.stats.slots_total),
    Metric(
        "headway_state_slots",
        "gauge",
        "State slots: used by rows, cached as snapshots, fenced until a step retires, free",
        state_slots,
        "state",
    ),
    Metric(
        "headway_preemptions",
        "counter",
        "Running requests whose memory was taken back, to be computed again",
        lambda s: s.stats.num_evictions_total,
    ),
    Metric(
        "headway_prefix_lookups",
        "counter",
        "Requests that looked for a cached prefix: hits, and misses by their first reason",
        _lookups,
        "result",
    ),
    Metric(
        "headway_prefix_waits",
        "counter",
        "Requests that waited for a running prompt to leave their prefix",
        lambda s: s.stats.prefix_cache.num_waits,
    ),
    Metric(
        "headway_snapshot_bytes",
        "gauge",
        "Of the states that are kept for prefixes",
        lambda s: s.stats.prefix_cache.snapshot_bytes,
    ),
    Metric(
        "headway_snapshots_taken",
        "counter",
        "States kept for prefixes",
        lambda s: s.stats.prefix_cache.num_snapshots_taken,
    ),
    Metric(
        "headway_snapshots_evicted",
        "counter",
        "States of prefixes given up for others",
        lambda s: s.stats.prefix_cache.num_evicted_snapshots,
    ),
    Metric(
        "headway_prefix_blocks_evicted",
        "counter",
        "KV blocks of prefixes given up for others",
        lambda s: s.stats.prefix_cache.num_evicted_blocks,
    ),
    Metric(
        "headway_prefix_host_hits",
        "counter",
        "Prefixes found that only host memory had",
        lambda s: s.stats.prefix_cache.num_host_hits,
    ),
    Metric(
        "headway_prefix_host_blocks",
        "counter",
        "KV blocks of prefixes copied between the device and host memory",
        lambda s: _ways(s.stats.prefix_cache.num_saved_blocks, s.stats.prefix_cache.num_loaded_blocks),
        "way",
    ),
    Metric(
        "headway_prefix_host_snapshots",
        "counter",
        "States of prefixes copied between the device and host memory",
        lambda s: _ways(s.stats.prefix_cache.num_saved_snapshots, s.stats.prefix_cache.num_loaded_snapshots),
        "way",
    ),
    Metric("headway_steps", "counter", "Steps that retired", lambda s: s.stats.steps_committed),
    Metric(
        "headway_steps_in_flight",
        "gauge",
        "Launched and not yet retired: the launch depth of the moment",
        lambda s: s.stats.steps_launched - s.stats.steps_committed,
    ),
    Metric(
        "headway_launch_lead_seconds",
        "summary",
        "Steps launched before the host had the results of the step before, and how long before",
        lambda s: Summary(s.stats.num_led_steps_total, s.stats.launch_lead_s),
    ),
    Metric(
        "headway_device_busy_seconds",
        "counter",
        "In steps, by the device's own clock; 0 where it has none",
        lambda s: s.stats.device_busy_s,
    ),
    Metric(
        "headway_device_idle_seconds",
        "counter",
        "Between steps while there was work, likewise",
        lambda s: s.stats.device_idle_s,
    ),
    Metric(
        "headway_device_idle_share",
        "gauge",
        "Idle over idle and busy, since the start",
        _idle_share,
    ),
    Metric(
        "headway_seconds_since_progress",
        "gauge",
        "Since a step retired; 0 while there is nothing to do",
        lambda s: s.stats.seconds_since_progress,
    ),
)
