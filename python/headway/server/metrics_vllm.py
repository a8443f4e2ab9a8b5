"""Metrics under the names that vLLM has for them, for dashboards and routers that know those: --vllm-metrics."""

from __future__ import annotations

from headway.server.exposition import Info, Metric, Seen
from headway.server.metrics import kv_usage


def _cache_config(seen: Seen) -> Info:
    """What routers read to know how much a server can hold."""
    settings = seen.info.settings
    names = ("block_size", "enable_prefix_caching", "gpu_memory_utilization")
    labels = {name: str(settings[name]) for name in names if name in settings}
    return Info({**labels, "num_gpu_blocks": str(seen.stats.blocks_total)})


VLLM_METRICS: tuple[Metric, ...] = (
    Metric(
        "vllm:num_requests_running", "gauge", "Completions that hold a row", lambda s: s.stats.num_running
    ),
    Metric("vllm:num_requests_waiting", "gauge", "Completions in the queue", lambda s: s.stats.num_waiting),
    Metric("vllm:kv_cache_usage_perc", "gauge", "Share of KV blocks that requests hold, 0 to 1", kv_usage),
    Metric("vllm:cache_config_info", "gauge", "1, with the sizes of the KV cache as labels", _cache_config),
    Metric("vllm:num_preemptions", "counter", "Preemptions", lambda s: s.stats.num_evictions_total),
    Metric(
        "vllm:prefix_cache_queries",
        "counter",
        "Prompt tokens looked for",
        lambda s: s.stats.prefix_cache.num_prompt_tokens,
    ),
    Metric(
        "vllm:prefix_cache_hits",
        "counter",
        "Prompt tokens found",
        lambda s: s.stats.prefix_cache.num_cached_tokens,
    ),
    Metric("vllm:prompt_tokens", "counter", "Prompt tokens", lambda s: s.stats.num_prompt_tokens_total),
    Metric(
        "vllm:prompt_tokens_cached",
        "counter",
        "Prompt tokens found in the prefix cache",
        lambda s: s.stats.prefix_cache.num_cached_tokens,
    ),
    Metric("vllm:generation_tokens", "counter", "Generated", lambda s: s.stats.num_output_tokens_total),
    Metric(
        "vllm:request_success",
        "counter",
        "Completions by how they ended",
        lambda s: {reason: s.requests.ends[reason] for reason in ("stop", "length", "abort", "error")},
        "finished_reason",
    ),
    Metric(
        "vllm:time_to_first_token_seconds",
        "histogram",
        "Time to first token",
        lambda s: s.requests.ttft_s,
    ),
    Metric(
        "vllm:inter_token_latency_seconds",
        "histogram",
        "Between tokens of a stream",
        lambda s: s.requests.token_gap_s,
    ),
    Metric(
        "vllm:request_time_per_output_token_seconds",
        "histogram",
        "A request's mean time of a token after the first",
        lambda s: s.requests.tpot_s,
    ),
    Metric(
        "vllm:e2e_request_latency_seconds", "histogram", "From arrival to end", lambda s: s.requests.latency_s
    ),
    Metric(
        "vllm:request_queue_time_seconds", "histogram", "From arrival to a row", lambda s: s.requests.queue_s
    ),
    Metric(
        "vllm:request_prefill_time_seconds",
        "histogram",
        "From a row to the first token",
        lambda s: s.requests.prefill_s,
    ),
    Metric(
        "vllm:request_decode_time_seconds",
        "histogram",
        "From the first token to the end",
        lambda s: s.requests.decode_s,
    ),
    Metric(
        "vllm:request_inference_time_seconds",
        "histogram",
        "From a row to the end",
        lambda s: s.requests.inference_s,
    ),
    Metric(
        "vllm:request_prompt_tokens",
        "histogram",
        "Prompt tokens a request",
        lambda s: s.requests.num_prompt_tokens,
    ),
    Metric(
        "vllm:request_generation_tokens",
        "histogram",
        "Generated tokens a request",
        lambda s: s.requests.num_output_tokens,
    ),
    Metric("vllm:request_params_n", "histogram", "n of a request", lambda s: s.requests.num_completions),
    Metric(
        "vllm:request_params_max_tokens",
        "histogram",
        "max_tokens of a request that set it",
        lambda s: s.requests.max_tokens,
    ),
)
