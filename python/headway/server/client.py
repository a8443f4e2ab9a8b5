"""What the HTTP layer needs of an engine, wherever that engine runs: records and one protocol, no behaviour.

`headway.aio.AsyncLLM` is an `EngineClient` in the same process; another may stand for an engine in a process of its
own. Records hold plain data only, so that they can be sent.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from headway.outputs import PromptLogprobs, RequestMetrics, StepSpan, TokenLogprobs
from headway.request import SamplingParams
from headway.text import ChatTemplate, Tokenizer


@dataclass(slots=True)  # one a request: frozen ones take four times as long to make
class EngineRequest:
    """One prompt as token ids, with everything the engine must know of it.

    Attributes:
        request_id: unique among the requests that are not over.
        prompt: the prompt's text, where there is one; kept for outputs, not read by the engine.
        priority: lower runs first.
        cache_salt: requests share cached prefixes only with requests of an equal salt.
        use_prefix_cache: False: nothing cached is read, and nothing is left behind.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None
    priority: int = 0
    cache_salt: str | None = None
    use_prefix_cache: bool = True


@dataclass(slots=True)  # one an event: frozen ones take four times as long to make
class Usage:
    """Tokens of a request so far; outputs summed over its completions."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int  # of the prompt, found in the prefix cache


@dataclass(slots=True)
class EngineOutput:
    """What one completion of a request gained since its last output. A slow reader gets fewer and larger ones.

    Attributes:
        index: of the completion, 0 .. n - 1.
        text: new text; whole characters only, and none that may still become part of a stop string.
        logprobs: one dictionary per new token; None when not asked for.
        finish_reason: "stop", "length", "abort" or "error" on the last output of the completion, else None.
        stop_reason: `CompletionOutput.stop_reason`.
        prompt_logprobs: on the first output of completion 0, when asked for: one entry per prompt token, the first is
            None.
        metrics: on the last output of the completion.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    usage: Usage
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | None = None
    metrics: RequestMetrics | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What does not change while an engine lives."""

    model: str  # checkpoint folder, or the embedded model's name
    family: str
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int  # tokens of prompt and output
    max_logprobs: int
    launch_depth: int
    eos_token_ids: tuple[int, ...]
    default_params: SamplingParams  # where a caller sets nothing
    settings: dict[str, str | int | float | bool | None] = field(
        default_factory=dict
    )  # EngineConfig as resolved


@dataclass(frozen=True, slots=True)
class PrefixCacheStats:
    """What the prefix cache holds and did since the start; docs/prefix_cache.md tells the reasons of misses."""

    num_lookups: int = 0
    num_hits: int = 0
    num_prompt_tokens: int = 0  # of all lookups
    num_cached_tokens: int = 0  # of those, found
    num_waits: int = 0  # requests that waited for a running prompt to leave their prefix
    num_too_short: int = 0
    num_pending: int = 0
    num_without_snapshot: int = 0
    num_other_salt: int = 0
    num_without_kv: int = 0
    num_blocks: int = 0  # held now
    num_evictable_blocks: int = 0  # of those, with nobody
    num_snapshots: int = 0  # held now
    snapshot_bytes: int = 0  # of those
    num_waypoints: int = 0  # of those, kept at strides
    num_snapshots_taken: int = 0
    num_evicted_blocks: int = 0
    num_evicted_snapshots: int = 0  # those moved to host memory are not
    num_host_blocks: int = 0  # held in host memory now
    num_host_snapshots: int = 0
    num_saved_blocks: int = 0  # moved there
    num_saved_snapshots: int = 0
    num_loaded_blocks: int = 0  # brought back
    num_loaded_snapshots: int = 0
    num_host_hits: int = 0  # of the hits, those that only host memory made possible


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters of the engine at one moment. `*_total` only grow; free + fenced <= total for blocks and slots."""

    num_waiting: int
    num_running: int
    num_paused: int
    blocks_total: int
    blocks_free: int
    blocks_fenced: int
    slots_total: int
    slots_free: int
    slots_fenced: int
    steps_launched: int
    steps_committed: int
    num_evictions_total: int
    num_finished_total: int
    num_prompt_tokens_total: int  # of the requests taken
    num_output_tokens_total: int
    device_busy_s: float  # by the device's own clock; 0 where it has none
    device_idle_s: float  # between steps that followed one another, likewise
    seconds_since_progress: float  # since a step was committed; 0 while there is nothing to do
    num_led_steps_total: int = 0  # launched before the host had the results of the step before
    launch_lead_s: float = 0.0  # of those in all, from their launch to those results
    prefix_cache: PrefixCacheStats = field(default_factory=PrefixCacheStats)


@dataclass(frozen=True, slots=True)
class Health:
    """Whether requests are taken, and why not."""

    is_alive: bool  # False: the engine has died and takes no more requests, ever
    is_ready: bool  # False: it is starting, draining, closed or dead
    reason: str  # in words, empty while all is well
    seconds_since_progress: float


class EngineHandle(Protocol):
    """What whoever holds an engine asks of it, requests aside. All calls come from one event loop."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def chat_template(self) -> ChatTemplate | None: ...

    async def abort(self, request_id: str) -> bool:
        """Ends a request, with finish_reason "abort" to whoever reads it. False when it is unknown or over."""
        ...

    async def stats(self) -> EngineStats: ...

    async def recent_steps(self) -> list[StepSpan]:
        """The last steps that retired, a few hundred, oldest first. Never waits for the engine."""
        ...

    async def health(self) -> Health:
        """Never waits for the engine."""
        ...

    async def reset_prefix_cache(self) -> bool:
        """Forgets cached prefixes that no request uses. False when some are in use and stay."""
        ...

    async def start_profile(self) -> None:
        """Begins to record steps. Raises RequestError when one is being recorded."""
        ...

    async def stop_profile(self) -> str:
        """Ends the record and returns it as JSON for Perfetto. Raises RequestError when none is being recorded."""
        ...

    async def close(self) -> None:
        """Aborts what is left and frees the engine. Legal twice."""
        ...


class EngineClient(EngineHandle, Protocol):
    """An engine as a server sees it.

    Errors: RequestError and CapacityError for what is wrong with a request, OverloadedError while too many wait,
    EngineDeadError once the engine has died; all before the first output of a request, but EngineDeadError may also
    come instead of a later one.
    """

    def stream(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Queues the request when first awaited and ends after the last output of its last completion.

        Leaving early (aclose, cancellation) aborts it.
        """
        ...

    async def drain(self) -> None:
        """Takes no more requests; returns when those it has are over."""
        ...
