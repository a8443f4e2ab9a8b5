"""What a caller gets back. Plain records; filled by `headway.engine`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token, by the model's logits or as logprobs_mode has it."""

    logprob: float
    rank: int | None  # 1 = most likely; vocabulary rank
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]  # token id -> its logprob: the chosen token and the top alternatives
PromptLogprobs = list[
    TokenLogprobs | None
]  # one entry per prompt token; nothing comes before the first: None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times of one request, in seconds of `time.perf_counter`; None where it never came so far.

    Attributes:
        admitted_s: when the first of its completions got a row; until then it waited in the queue.
    """

    arrival_s: float
    first_token_s: float | None
    finished_s: float | None
    num_prompt_tokens: int
    num_output_tokens: int
    admitted_s: float | None = None

    @property
    def queue_s(self) -> float | None:
        """Arrival to its row."""
        return _between(self.arrival_s, self.admitted_s)

    @property
    def prefill_s(self) -> float | None:
        """Row to first token."""
        return _between(self.admitted_s, self.first_token_s)

    @property
    def decode_s(self) -> float | None:
        """First token to end."""
        return _between(self.first_token_s, self.finished_s)

    @property
    def inference_s(self) -> float | None:
        """Row to end."""
        return _between(self.admitted_s, self.finished_s)

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token."""
        return _between(self.arrival_s, self.first_token_s)

    @property
    def latency_s(self) -> float | None:
        """Arrival to end."""
        return _between(self.arrival_s, self.finished_s)

    @property
    def tpot_s(self) -> float | None:
        """Mean time of an output token after the first."""
        if self.first_token_s is None or self.finished_s is None or self.num_output_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.num_output_tokens - 1)


def _between(begin_s: float | None, end_s: float | None) -> float | None:
    return None if begin_s is None or end_s is None else end_s - begin_s


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        finish_reason: "stop", "length", "abort", "error", or None while it goes on.
        stop_reason: the stop string or stop token id that ended it; None for the model's end token. Of an "error", what
            failed: "logits" (none of them usable), "grammar" (it allows nothing here, or needs too much), "internal".
        logprobs: one dictionary per output token; None when not asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its completions, `SamplingParams.n` of them."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: PromptLogprobs | None = None  # when asked for; complete with the first output
    num_cached_tokens: int | None = None  # of the prompt, found cached; None before the first token


@dataclass(slots=True)  # one an event: frozen ones take four times as long to make
class Delta:
    """What one completion gained since the last delta, as `LLM.stream` yields it."""

    prompt_index: int  # of the prompt in the call
    index: int  # of the completion of that prompt
    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    metrics: RequestMetrics | None = None  # with the last delta of a completion


@dataclass(frozen=True, slots=True)
class StepSpan:
    """One step that has retired. Its times are of one clock: the device's own, or the host's where it has none."""

    step: int
    begin_ns: int
    end_ns: int
    num_rows: int
    num_decode_rows: int
    num_tokens: int  # of prompts and of decoding rows
