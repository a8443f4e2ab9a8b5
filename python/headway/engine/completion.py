"""One completion while it grows: tokens, text, log-probabilities, why it ended. Knows no ledger, no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from headway.errors import RequestError
from headway.outputs import (
    CompletionOutput,
    Delta,
    PromptLogprobs,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from headway.request import SamplingParams
from headway.sampling.stop import StopMatcher


class Detokenizer(Protocol):
    """What `headway.text.IncrementalDetokenizer` offers."""

    def append(self, token_id: int) -> str: ...
    def extend(self, token_ids: Sequence[int]) -> str: ...
    def finish(self) -> str: ...


class TokenGuide(Protocol):
    """What `headway.engine.guided.Guide` offers."""

    def begin(self) -> None: ...
    def advance(self, token: int) -> None: ...


class Completion:
    """Grows by `append`, ends by `end`; read as deltas or as a whole.

    Text is made only when somebody needs it: at every token where stop strings are watched for, else when a
    delta or the output is taken.
    """

    def __init__(self, request: Request, index: int, detokenizer: Detokenizer | None) -> None:
        params = request.params
        self.request = request
        self.index = index
        self.ledger_id = -1
        self.num_cached_tokens: int | None = None  # of the prompt; known with the first token
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.cumulative_logprob = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.admitted_s: float | None = None  # first given a row
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self.guide: TokenGuide | None = None  # of a structured output
        self.is_plain = False  # its next token is appended and that is all, unless it is the last
        self._detokenizer = detokenizer
        self._matcher = self._make_matcher(params) if detokenizer else None
        self._pieces: list[str] = []
        self._num_text_tokens = 0  # tokens already turned into text
        self._num_pieces_taken = 0
        self._num_tokens_taken = 0
        self.is_read = False  # the last delta was taken

    @staticmethod
    def _make_matcher(params: SamplingParams) -> StopMatcher | None:
        if not params.stop_strings:
            return None
        return StopMatcher(params.stop_strings, is_included=params.include_stop_str_in_output)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, token: int, now_s: float, *, is_stop_token: bool = False) -> str | None:
        """Adds a sampled token; returns the stop string it completed, if any.

        A stop token belongs to the output's tokens but, unless asked for, not to its text.
        """
        if self.first_token_s is None:
            self.first_token_s = now_s
            self.is_plain = self._matcher is None and self.logprobs is None and self.guide is None
        self.token_ids.append(token)
        if is_stop_token and not self.request.params.include_stop_str_in_output:
            self._make_text(len(self.token_ids) - 1)
            self._num_text_tokens = len(self.token_ids)
        elif self._matcher is not None:
            self._make_text(len(self.token_ids))
        return None if self._matcher is None else self._matcher.matched

    def append_logprobs(self, token: int, entry: TokenLogprobs) -> None:
        assert self.logprobs is not None
        self.logprobs.append(entry)
        self.cumulative_logprob += entry[token].logprob

    def check_rewind(self, num_positions: int) -> None:
        """Raises RequestError where the last num_positions tokens are not there, or were shown."""
        most = len(self.token_ids) - self._num_tokens_taken
        if not 0 <= num_positions <= most:
            raise RequestError(
                "num_positions", num_positions, f"in [0, {most}], the tokens that no delta has shown"
            )

    def rewind(self, num_positions: int, detokenizer: Detokenizer | None) -> None:
        """Forgets the last num_positions tokens; the text of the others is made anew by a fresh detokenizer."""
        num_kept = len(self.token_ids) - num_positions
        del self.token_ids[num_kept:]
        if self.logprobs is not None:
            del self.logprobs[num_kept:]
            chosen = (entry[token] for token, entry in zip(self.token_ids, self.logprobs, strict=True))
            self.cumulative_logprob = sum(entry.logprob for entry in chosen)
        num_text_tokens = min(self._num_text_tokens, num_kept)
        self._detokenizer, self._pieces, self._num_text_tokens = detokenizer, [], 0
        self._matcher = self._make_matcher(self.request.params) if detokenizer else None
        self._make_text(num_text_tokens)

    def end(self, reason: str, stop_reason: str | int | None, now_s: float) -> None:
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.finished_s = now_s

    def give_up_text(self) -> None:
        """No more text is made: what there is stays."""
        self._detokenizer = None

    def take_delta(self) -> Delta | None:
        """What came since the last call; None while there is no text to show, such as half a character."""
        is_text = self._detokenizer is not None
        text = self._new_text()
        if not self.is_finished and (not text if is_text else self._num_tokens_taken == len(self.token_ids)):
            return None
        begin, self._num_tokens_taken = self._num_tokens_taken, len(self.token_ids)
        self.is_read = self.is_finished
        return Delta(
            prompt_index=self.request.prompt_index,
            index=self.index,
            text=text,
            token_ids=self.token_ids[begin:],
            logprobs=None if self.logprobs is None else self.logprobs[begin:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            metrics=self.request.metrics() if self.is_finished else None,
        )

    def take_tokens(self) -> list[int]:
        """`take_delta` for less, of a completion without text that merely goes on; else, and at first, empty."""
        begin = self._num_tokens_taken
        if not begin or not self.is_plain or self.is_finished or self._detokenizer is not None:
            return []
        self._num_tokens_taken = len(self.token_ids)
        return self.token_ids[begin:]

    def output(self) -> CompletionOutput:
        self._finish_text()
        return CompletionOutput(
            index=self.index,
            text="".join(self._pieces),
            token_ids=list(self.token_ids),
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _new_text(self) -> str:
        self._finish_text()
        begin, self._num_pieces_taken = self._num_pieces_taken, len(self._pieces)
        return "".join(self._pieces[begin:])

    def _make_text(self, num_tokens: int) -> None:
        """Detokenises up to num_tokens. The first min_tokens tokens cannot be part of a stop string."""
        if self._detokenizer is None:
            return
        if self._matcher is None:
            self._pieces.append(self._detokenizer.extend(self.token_ids[self._num_text_tokens : num_tokens]))
        else:
            self._push_text(self._detokenizer, self._matcher, num_tokens)
        self._num_text_tokens = max(self._num_text_tokens, num_tokens)

    def _push_text(self, detokenizer: Detokenizer, matcher: StopMatcher, num_tokens: int) -> None:
        for place in range(self._num_text_tokens, num_tokens):
            piece = detokenizer.append(self.token_ids[place])
            is_watched = place >= self.request.params.min_tokens
            self._pieces.append(matcher.push(piece) if is_watched else piece)

    def _finish_text(self) -> None:
        self._make_text(len(self.token_ids))
        if not self.is_finished or self._detokenizer is None:
            return
        rest = self._detokenizer.finish()
        self._pieces.append(
            rest if self._matcher is None else self._matcher.push(rest) + self._matcher.flush()
        )
        self._detokenizer = None


@dataclass
class Request:
    """A prompt, its parameters and its n completions."""

    request_id: str
    prompt_index: int  # in the call that brought it
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_s: float
    completions: list[Completion] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None  # one entry for each prompt token, as far as they have come

    def __post_init__(self) -> None:
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def is_finished(self) -> bool:
        return all(completion.is_finished for completion in self.completions)

    @property
    def num_output_tokens(self) -> int:
        return sum([len(completion.token_ids) for completion in self.completions])

    @property
    def num_cached_tokens(self) -> int | None:
        """Of the prompt, found in the prefix cache by the completion that was computed first."""
        for completion in self.completions:
            if completion.num_cached_tokens is not None:
                return completion.num_cached_tokens
        return None

    def metrics(self) -> RequestMetrics:
        admitted = [c.admitted_s for c in self.completions if c.admitted_s is not None]
        first = [c.first_token_s for c in self.completions if c.first_token_s is not None]
        ends = [c.finished_s for c in self.completions if c.finished_s is not None]
        return RequestMetrics(
            arrival_s=self.arrival_s,
            first_token_s=min(first, default=None),
            finished_s=max(ends) if self.is_finished and ends else None,
            num_prompt_tokens=len(self.prompt_token_ids),
            num_output_tokens=self.num_output_tokens,
            admitted_s=min(admitted, default=None),
        )

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion.output() for completion in self.completions],
            finished=self.is_finished,
            metrics=self.metrics(),
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
        )
