"""The engine: requests in, completions out, one `step()` at a time. Knows no checkpoint and no socket."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from headway.engine.bindings import core
from headway.engine.completion import Completion, Detokenizer, Request
from headway.engine.guided import MaskWorkers
from headway.engine.interrupts import DeferInterrupt
from headway.engine.output import OutputProcessor
from headway.engine.stages import Stages
from headway.errors import EngineDeadError, IntegrityError, RequestError
from headway.request import SamplingParams, is_int
from headway.sampling.bad_words import bad_word_tokens
from headway.sampling.grammar import GrammarCompiler
from headway.sampling.limits import RequestLimits
from headway.sampling.seeds import SeedSource, completion_seed

if TYPE_CHECKING:
    from collections.abc import Callable

    from headway._core import Ledger, Plan, SamplingSpec


class StepRunner(Protocol):
    """What carries a plan out: `headway.engine.runner.Runner`."""

    def launch(self, plan: Plan) -> None: ...
    def wait(self, is_ready: Callable[[], bool]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class CheckedRequest:
    """A request that passed every check and can be queued."""

    request_id: str
    prompt_index: int
    prompt: str | None
    token_ids: npt.NDArray[np.int32]  # [n]
    params: SamplingParams
    priority: int  # lower runs first
    bad_words: list[list[int]]  # token sequences
    cache_salt: str | None = None  # shares cached prefixes with requests of an equal salt alone
    uses_prefix_cache: bool = True


class Engine:
    """Runs requests over a ledger and a runner. Not thread-safe: `LLM` holds the lock.

    After a fault in a step every call raises EngineDeadError with the fault as its cause.
    """

    def __init__(
        self,
        ledger: Ledger,
        runner: StepRunner,
        limits: RequestLimits,
        *,
        seed: int = 0,
        make_detokenizer: Callable[[Sequence[int], SamplingParams], Detokenizer] | None = None,
        decode_token: Callable[[int], str] | None = None,
        encode: Callable[[str], list[int]] | None = None,
        grammars: GrammarCompiler | None = None,
        has_processed_logprobs: bool = False,
    ) -> None:
        self.limits = limits
        self.ledger = ledger
        self._runner = runner
        self._outputs = OutputProcessor(ledger.finish, ledger.abort, decode_token)
        self._masks = MaskWorkers(ledger, grammars)
        self._seeds = SeedSource(seed)
        self._make_detokenizer = make_detokenizer
        self._encode = encode
        self._has_processed_logprobs = has_processed_logprobs
        self.stages = Stages(
            _planning(ledger, self._outputs), runner.launch, runner.wait, ledger.commit, self._outputs.apply
        )
        self._fault: BaseException | None = None
        self._is_closed = False

    def step(self) -> list[Completion]:
        """Plans and launches what the launch depth allows, then collects the oldest step; returns who changed."""
        self._refuse_if_dead()
        if failed := self._masks.take_failed():
            return self._outputs.fail(failed, time.perf_counter())
        stages = self.stages
        with DeferInterrupt():
            try:
                while (plan := stages.plan()) is not None:
                    stages.launch(plan)
                if not self.ledger.num_in_flight:
                    return self._idle()
                stages.collect(self.ledger.is_ready)
                commit = stages.commit()
            except Exception as fault:
                raise self._die(fault) from fault
            assert commit is not None
            return stages.outputs(commit, time.perf_counter())

    def check(
        self,
        request_id: str,
        prompt_index: int,
        prompt: str | None,
        token_ids: Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        *,
        cache_salt: str | None = None,
        uses_prefix_cache: bool = True,
    ) -> CheckedRequest:
        """Finds all that can be wrong with a request before anything is queued. Raises RequestError."""
        self._refuse_if_dead()
        if not is_int(priority) or not -(2**31) <= priority < 2**31:
            raise RequestError("priority", priority, "an integer in [-2**31, 2**31)", hint="lower runs first")
        if cache_salt is not None and not (isinstance(cache_salt, str) and cache_salt):
            raise RequestError("cache_salt", cache_salt, "a string of at least one character, or None")
        if not isinstance(uses_prefix_cache, bool):
            raise RequestError("use_prefix_cache", uses_prefix_cache, "True or False")
        self.limits.check_params(params)
        tokens = self.limits.check_prompt(token_ids, params.truncate_prompt_tokens)
        if params.structured_outputs is not None:
            self._masks.compile(params.structured_outputs)
        bad_words = bad_word_tokens(params.bad_words or (), self._encode)
        self.limits.check_bad_words(bad_words)
        return CheckedRequest(
            request_id,
            prompt_index,
            prompt,
            tokens,
            params,
            priority,
            bad_words,
            cache_salt,
            uses_prefix_cache,
        )

    def prepare(self, params: SamplingParams) -> None:
        """Does what takes time in `check` beforehand; on any thread."""
        if isinstance(params, SamplingParams) and params.structured_outputs is not None:
            self._masks.compile(params.structured_outputs)

    def prepare_grammars(self) -> None:
        """For an engine that serves strangers: its first structured output then holds nobody up."""
        self._masks.prepare()

    def submit(self, checked: CheckedRequest) -> Request:
        """Queues a request's n completions, or none of them. Raises CapacityError if it can never fit."""
        self._refuse_if_dead()
        request = Request(
            request_id=checked.request_id,
            prompt_index=checked.prompt_index,
            prompt=checked.prompt,
            prompt_token_ids=checked.token_ids.tolist(),
            params=checked.params,
            arrival_s=time.perf_counter(),
        )
        seed = checked.params.seed if checked.params.seed is not None else self._seeds.draw()
        with DeferInterrupt():
            try:
                for index in range(checked.params.n):
                    self._queue(request, index, checked, completion_seed(seed, index))
            except Exception:
                self.abort(request)
                raise
        return request

    def abort(self, request: Request) -> None:
        """Ends what is left of a request; its results in flight become void. Legal at any time, and twice."""
        with DeferInterrupt():
            for completion in request.completions:
                self._outputs.cancel(completion, time.perf_counter())

    def rewind(self, completion: Completion, num_positions: int) -> bool:
        """Drops a completion's last num_positions tokens and all that is in flight of it; it goes on from there.

        False when it is over. Raises RequestError, changing nothing, where tokens have been taken as a delta
        already, or where the model's KV and state cannot go back so far.
        """
        self._refuse_if_dead()
        if completion.is_finished:
            return False
        if completion.guide is not None:
            raise RequestError("num_positions", num_positions, "used on outputs that follow no grammar")
        with DeferInterrupt():
            completion.check_rewind(num_positions)
            if not self.ledger.rewind(completion.ledger_id, num_positions):
                return False
            completion.rewind(num_positions, self._detokenizer_of(completion.request))
        return True

    def prefix_cache_stats(self) -> dict[str, int]:
        """Every counter of `PrefixStats`, by name."""
        stats = self.ledger.prefix_stats()
        return {name: getattr(stats, name) for name in dir(stats) if name.startswith("num_")}

    @property
    def num_unfinished(self) -> int:
        return self._outputs.num_live

    def close(self) -> None:
        """Aborts everything and lets go of the runner, and so of all device memory. Legal twice."""
        if self._is_closed:
            return
        for completion in self._outputs.live:
            self._outputs.cancel(completion, time.perf_counter())
        self._is_closed = True
        self._masks.close()
        self._runner.close()
        del self._runner, self.stages

    def _queue(self, request: Request, index: int, checked: CheckedRequest, seed: int) -> None:
        params, prompt = checked.params, checked.token_ids
        completion = Completion(request, index, self._detokenizer_of(request))
        if params.structured_outputs is not None:
            completion.guide = self._masks.guide(completion, params.structured_outputs)
        max_new_tokens = self.limits.max_new_tokens(len(prompt), params)
        completion.ledger_id = self.ledger.add(
            prompt,
            self._spec(checked, index, seed),
            max_new_tokens=max_new_tokens,
            priority=checked.priority,
            salt=(checked.cache_salt or "").encode(),
            uses_cache=checked.uses_prefix_cache,
        )
        request.completions.append(completion)
        self._outputs.add(completion)
        if completion.guide is not None:
            completion.guide.begin()

    def _detokenizer_of(self, request: Request) -> Detokenizer | None:
        if self._make_detokenizer is None or not request.params.detokenize:
            return None
        return self._make_detokenizer(request.prompt_token_ids, request.params)

    def _spec(self, checked: CheckedRequest, index: int, seed: int) -> SamplingSpec:
        """Of n completions the first reports the prompt's log-probabilities."""
        params, limits = checked.params, self.limits
        asked = params.prompt_logprobs if index == 0 else None
        return core.SamplingSpec(
            seed=seed,
            temperature=params.effective_temperature,
            top_p=params.top_p,
            min_p=params.min_p,
            top_k=max(params.top_k, 0),
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            min_tokens=params.min_tokens,
            num_logprobs=limits.num_logprobs("logprobs", params.logprobs),
            num_prompt_logprobs=limits.num_logprobs("prompt_logprobs", asked),
            has_processed_logprobs=self._has_processed_logprobs,
            is_guided=params.structured_outputs is not None,
            stop_ids=limits.stop_ids(params),
            logit_bias=dict(params.logit_bias or {}),
            bad_words=checked.bad_words,
            token_mask=limits.token_mask(params.allowed_token_ids),
        )

    def _idle(self) -> list[Completion]:
        """Nothing to launch and nothing in flight: fine when all is done, paused or held, our bug otherwise."""
        stats = self.ledger.stats()
        if stats.num_held or self._masks.may_have_news():
            self._masks.wait()
        elif stats.num_transfers:
            time.sleep(0)  # a prefix or memory is on its way: the next plan looks
        elif not stats.num_paused and (stats.num_waiting or stats.num_running):
            raise IntegrityError(
                f"{stats.num_waiting} waiting and {stats.num_running} running requests cannot move"
            )
        return []

    def _die(self, fault: Exception) -> EngineDeadError:
        self._fault = fault
        return EngineDeadError(f"the engine stopped: {fault}", hint="create a new LLM")

    def _refuse_if_dead(self) -> None:
        if self._fault is not None:
            raise EngineDeadError(
                f"the engine stopped earlier: {self._fault}", hint="create a new LLM"
            ) from self._fault
        if self._is_closed:
            raise EngineDeadError("the engine is closed", hint="create a new LLM")


def _planning(ledger: Ledger, outputs: OutputProcessor) -> Callable[[], Plan | None]:
    """`ledger.plan`, noting who got a row."""

    def plan() -> Plan | None:
        made = ledger.plan()
        if made is not None and made.num_admitted:
            outputs.admit(ledger.admitted_requests(), time.perf_counter())
        return made

    return plan
