"""From a commit to completions: who got which token, who ended and why. The only reader of `Commit`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headway.engine.bindings import core
from headway.engine.completion import Completion
from headway.sampling.logprobs import position_logprobs

if TYPE_CHECKING:
    from headway._core import Commit
    from headway.engine.guided import Failure

logger = logging.getLogger("headway")

_REASONS = {
    core.FINISH_STOP: "stop",
    core.FINISH_LENGTH: "length",
    core.FINISH_ABORT: "abort",
    core.FINISH_ERROR: "error",
}


@dataclass(frozen=True)
class SteadyRows:
    """The rows of a commit that went on, all of them plain: where the next commit has the same ones, and none that
    ends, its tokens are appended and that is all.
    """

    request_ids: bytes  # [n] int64, likewise below
    finish_reasons: bytes  # NOT_FINISHED all
    completions: list[Completion]  # never changed: handed to whoever asks what changed
    token_ids: list[list[int]]


class OutputProcessor:
    """Completions that are not over, by ledger id.

    `finish` tells the ledger that the host ended a request (a stop string), `abort` that its tokens are void.
    """

    def __init__(
        self,
        finish: Callable[[int, int], bool],
        abort: Callable[[int], bool],
        decode_token: Callable[[int], str] | None,
    ) -> None:
        self._finish = finish
        self._abort = abort
        self._decode_token = decode_token
        self._live: dict[int, Completion] = {}
        self._steady: SteadyRows | None = None

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def live(self) -> list[Completion]:
        return list(self._live.values())

    def add(self, completion: Completion) -> None:
        self._live[completion.ledger_id] = completion

    def admit(self, ledger_ids: list[int], now_s: float) -> None:
        """Completions that got a row; who had one before keeps its first time."""
        for ledger_id in ledger_ids:
            completion = self._live.get(ledger_id)
            if completion is not None and completion.admitted_s is None:
                completion.admitted_s = now_s

    def apply(self, commit: Commit, now_s: float) -> list[Completion]:
        """Hands each token of a commit to its completion; returns the completions that changed."""
        if len(commit.score_tokens):
            self._add_prompt_logprobs(commit)
        request_ids, finish_reasons = commit.request_ids.tobytes(), commit.finish_reasons.tobytes()
        steady = self._steady
        if steady and steady.request_ids == request_ids and steady.finish_reasons == finish_reasons:
            core.append_each(steady.token_ids, commit.tokens)
            return steady.completions
        self._steady = None
        changed = self._apply_each(commit, now_s)
        all_go_on = bool((commit.finish_reasons == core.NOT_FINISHED).all())
        if all_go_on and len(changed) == len(commit.tokens) and all(each.is_plain for each in changed):
            token_ids = [completion.token_ids for completion in changed]
            self._steady = SteadyRows(request_ids, finish_reasons, changed, token_ids)
        return changed

    def _apply_each(self, commit: Commit, now_s: float) -> list[Completion]:
        changed: list[Completion] = []
        going_on = core.NOT_FINISHED
        columns = zip(
            commit.request_ids.tolist(),
            commit.tokens.tolist(),
            commit.finish_reasons.tolist(),
            commit.stop_tokens.tolist(),
            strict=True,
        )
        for place, (ledger_id, token, reason, stop_token) in enumerate(columns):
            completion = self._live.get(ledger_id)
            if completion is None:
                continue
            changed.append(completion)
            if completion.is_plain and reason == going_on:  # almost every token of a large batch
                completion.token_ids.append(token)
                continue
            if completion.num_cached_tokens is None:
                completion.num_cached_tokens = int(commit.cached_tokens[place])
            try:
                self._grow(completion, token, reason, stop_token, commit, place, now_s)
            except Exception as fault:  # one request's text must not cost the others theirs
                logger.exception(
                    "request %s ended: its output cannot be built: %s", completion.request.request_id, fault
                )
                self._abort(ledger_id)
                completion.give_up_text()
                self._end(completion, "error", "internal", now_s)
        return changed

    def fail(self, failures: list[Failure], now_s: float) -> list[Completion]:
        """Ends completions that cannot go on; returns those that were not over."""
        ended = []
        for failure in failures:
            completion = failure.completion
            if not completion.is_finished:
                self._abort(completion.ledger_id)
                self._end(completion, "error", failure.what, now_s)
                ended.append(completion)
        return ended

    def cancel(self, completion: Completion, now_s: float) -> None:
        """Ends a completion that its caller no longer wants."""
        if completion.is_finished:
            return
        self._abort(completion.ledger_id)
        self._end(completion, "abort", None, now_s)

    def _grow(
        self,
        completion: Completion,
        token: int,
        reason: int,
        stop_token: int,
        commit: Commit,
        place: int,
        now_s: float,
    ) -> None:
        matched = None
        if token >= 0:
            matched = completion.append(token, now_s, is_stop_token=stop_token >= 0)
            if completion.logprobs is not None:
                self._add_logprobs(completion, token, commit, place)
        if matched is not None:
            self._finish(
                completion.ledger_id, len(completion.token_ids)
            )  # no news to it if the token ended it too
            self._end(completion, "stop", matched, now_s)
        elif reason != core.NOT_FINISHED:
            self._end(completion, _REASONS[reason], _stop_reason(completion, reason, stop_token), now_s)
        elif completion.guide is not None:
            completion.guide.advance(token)

    def _add_prompt_logprobs(self, commit: Commit) -> None:
        columns = zip(
            commit.score_request_ids.tolist(),
            commit.score_tokens.tolist(),
            commit.score_logprobs.tolist(),
            commit.score_ranks.tolist(),
            commit.score_top_ids.tolist(),
            commit.score_top_logprobs.tolist(),
            strict=True,
        )
        for ledger_id, token, logprob, rank, top_ids, top_logprobs in columns:
            completion = self._live.get(ledger_id)
            if completion is None or completion.request.prompt_logprobs is None:
                continue
            decode = self._decode_token if completion.request.params.detokenize else None
            entry = position_logprobs(token, logprob, rank, top_ids, top_logprobs, decode)
            completion.request.prompt_logprobs.append(entry)

    def _add_logprobs(self, completion: Completion, token: int, commit: Commit, place: int) -> None:
        asked = completion.request.params.logprobs or 0
        num_top = commit.top_ids.shape[1] if asked == -1 else asked
        entry = position_logprobs(
            token,
            float(commit.logprobs[place]),
            int(commit.ranks[place]),
            commit.top_ids[place, :num_top].tolist(),
            commit.top_logprobs[place, :num_top].tolist(),
            self._decode_token if completion.request.params.detokenize else None,
        )
        completion.append_logprobs(token, entry)

    def _end(self, completion: Completion, reason: str, stop_reason: str | int | None, now_s: float) -> None:
        completion.end(reason, stop_reason, now_s)
        del self._live[completion.ledger_id]
        self._steady = None


def _stop_reason(completion: Completion, reason: int, stop_token: int) -> str | int | None:
    """What failed, or the stop token id the caller named; None for the model's own end token."""
    if reason == core.FINISH_ERROR:
        return "logits"
    return stop_token if stop_token in (completion.request.params.stop_token_ids or ()) else None
