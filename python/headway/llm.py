"""`LLM`: prompts in, completions out. A thin face over `headway.engine`; safe to use from several threads."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

from headway.config import EngineConfig
from headway.engine.assemble import Progress, assemble
from headway.engine.completion import Completion, Request
from headway.engine.engine import CheckedRequest
from headway.engine.memory import MemoryPlan
from headway.engine.prompts import ChatRenderer, PromptReader
from headway.engine.trace import StepTrace
from headway.outputs import Delta, RequestOutput
from headway.request import (
    ChatMessage,
    Prompt,
    SamplingParams,
    is_conversation,
    one_per_prompt,
    prompt_list,
)
from headway.text import Tokenizer


@dataclass(frozen=True)
class CacheUse:
    """What a call wants of the prefix cache."""

    salt: str | None = None
    is_wanted: bool = True


ParamsArgument = SamplingParams | Sequence[SamplingParams] | None


class LLM(ChatRenderer):
    """A model ready to answer.

        with LLM() as llm:
            print(llm.generate("def fib(n):")[0].outputs[0].text)

    Args:
        model: checkpoint folder; None runs the model that is installed with Headway.
        progress: called with (bytes done, bytes in all) while weights load.
        **settings: fields of `EngineConfig`, listed in docs/settings.md.

    Raises:
        ConfigError: an unknown setting or a value out of range.
        ModelLoadError: the checkpoint is missing, unsupported or misshapen.
        MemoryBudgetError: weights and caches do not fit; names a flag and a value that would.
        BuildError: the compiled modules are missing.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        progress: Progress | None = None,
        **settings: Any,
    ) -> None:
        self.config = EngineConfig(model=_as_path(model), **settings)
        self._parts = assemble(self.config, progress)
        self._engine = self._parts.engine
        self._prompts = PromptReader(self._parts.tokenizer, self._parts.chat_template)
        self._lock = threading.RLock()
        self._request_numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: ParamsArgument = None,
        *,
        priority: int | Sequence[int] = 0,
        cache_salt: str | None = None,
        use_prefix_cache: bool = True,
        on_step: Callable[[int], None] | None = None,
    ) -> list[RequestOutput]:
        """Completes every prompt; the outputs are in the order of the prompts.

        Args:
            prompts: a string, token ids, {"prompt": ...}, {"prompt_token_ids": ...}, or a list of these.
            sampling_params: one for all or one per prompt; None takes the checkpoint's defaults.
            priority: one for all or one per prompt; lower runs first.
            cache_salt: prefixes are shared only between requests of an equal salt, such as one customer's.
            use_prefix_cache: False: nothing cached is read, and nothing is left behind.
            on_step: called after each step with the number of completions that this LLM is still working on.

        Raises RequestError before anything runs when one of the prompts or parameters is wrong.
        KeyboardInterrupt ends these requests alone; the LLM stays usable.
        """
        requests = self._submit(
            prompt_list(prompts), sampling_params, priority, CacheUse(cache_salt, use_prefix_cache)
        )
        unfinished = list(requests)
        try:
            while unfinished:
                if unfinished[-1].is_finished:
                    unfinished.pop()
                    continue
                self._step(unfinished[-1])
                if on_step is not None:
                    on_step(self._engine.num_unfinished)
        except BaseException:
            self._abort(requests)
            raise
        return [request.output() for request in requests]

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: ParamsArgument = None,
        *,
        cache_salt: str | None = None,
        use_prefix_cache: bool = True,
        **rendering: Any,
    ) -> list[RequestOutput]:
        """`generate` for one conversation or a list of them, rendered with the checkpoint's chat template.

        **rendering: keywords of `render_chat`, such as tools and chat_template_kwargs.
        """
        conversations = [messages] if is_conversation(messages) else messages
        prompts = [
            self.render_chat(cast("Sequence[ChatMessage]", conversation), **rendering)
            for conversation in conversations
        ]
        return self.generate(
            prompts, sampling_params, cache_salt=cache_salt, use_prefix_cache=use_prefix_cache
        )

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: ParamsArgument = None
    ) -> Iterator[Delta]:
        """Yields what each completion gains, as it comes. Leaving the loop early ends the requests."""
        deltas = self._deltas(self._submit(prompt_list(prompts), sampling_params))
        next(deltas)  # into its `try`: an iterator that is dropped unread ends its requests too
        return deltas

    @property
    def has_chat_template(self) -> bool:
        return self._parts.chat_template is not None

    def get_tokenizer(self) -> Tokenizer:
        return self._prompts.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Used where a call brings none: generation_config.json of the checkpoint over the built-in defaults."""
        return self._parts.defaults.params

    @property
    def vocab_size(self) -> int:
        return self._parts.model_config.vocab_size

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output that one request may have."""
        return self._parts.memory.max_model_len

    def trace_steps(self) -> StepTrace:
        """Records the times of every step from now on, and keeps recording until this LLM is closed."""
        with self._lock:
            trace = StepTrace()
            self._engine.stages = trace.around(self._engine.stages)
        return trace

    def describe(self) -> dict[str, str | int]:
        """Device, dtype, family and launch depth, for people and reports."""
        parts = self._parts
        return {
            "device": str(parts.device),
            "dtype": str(parts.dtype).removeprefix("torch."),
            "family": parts.model_config.family,
            "launch_depth": parts.launch_depth,
        }

    def memory_report(self) -> MemoryPlan:
        """Where the memory went; str() of it is the table printed at start-up."""
        return self._parts.memory

    def reset_prefix_cache(self) -> None:
        """No later request finds what is cached now, or what running ones compute."""
        with self._lock:
            self._engine.ledger.reset_prefix_cache()

    def prefix_cache_stats(self) -> dict[str, int]:
        """What the prefix cache holds and did since the start; the counters are explained in docs/prefix_cache.md."""
        with self._lock:
            stats = self._engine.prefix_cache_stats()
        return {**stats, "snapshot_bytes": stats["num_snapshots"] * self._parts.memory.slot_bytes}

    def close(self) -> None:
        """Ends all requests and frees the device's memory. Legal twice."""
        with self._lock:
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _deltas(self, requests: list[Request]) -> Iterator[Delta]:
        """An empty delta for `stream`, then theirs. A completion is open until its last delta was yielded, which may
        be long after another caller's steps have finished it.
        """
        open_completions = [completion for request in requests for completion in request.completions]
        try:
            yield Delta(0, 0, "")
            while open_completions:
                self._step(open_completions[0].request)
                still_open = []
                for completion in open_completions:
                    delta = self._take_delta(completion)
                    if delta is None or delta.finish_reason is None:
                        still_open.append(completion)
                    if delta is not None:
                        yield delta
                open_completions = still_open
        finally:
            self._abort(requests)

    def _take_delta(self, completion: Completion) -> Delta | None:
        with self._lock:
            return completion.take_delta()

    def _submit(
        self,
        prompts: Sequence[Prompt],
        sampling_params: ParamsArgument,
        priority: int | Sequence[int] = 0,
        cache_use: CacheUse | None = None,
    ) -> list[Request]:
        """Checks all, then queues all: one bad prompt leaves nothing behind."""
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        arguments = zip(
            prompts,
            one_per_prompt("sampling_params", params, len(prompts)),
            one_per_prompt("priority", priority, len(prompts)),
            strict=True,
        )
        with self._lock:
            checked = [
                self._check(index, prompt, params, its_priority, cache_use or CacheUse())
                for index, (prompt, params, its_priority) in enumerate(arguments)
            ]
            requests: list[Request] = []
            try:
                for request in checked:
                    requests.append(self._engine.submit(request))
            except BaseException:
                self._abort(requests)
                raise
        return requests

    def _check(
        self,
        prompt_index: int,
        prompt: Prompt,
        params: SamplingParams,
        priority: int,
        cache_use: CacheUse,
    ) -> CheckedRequest:
        text, token_ids = self._prompts.read(prompt)
        request_id = str(next(self._request_numbers))
        return self._engine.check(
            request_id,
            prompt_index,
            text,
            token_ids,
            params,
            priority,
            cache_salt=cache_use.salt,
            uses_prefix_cache=cache_use.is_wanted,
        )

    def _step(self, request: Request) -> None:
        """One step, unless another thread's step has finished the request while this one waited."""
        with self._lock:
            if not request.is_finished:
                self._engine.step()

    def _abort(self, requests: list[Request]) -> None:
        with self._lock:
            for request in requests:
                self._engine.abort(request)


def _as_path(model: str | os.PathLike[str] | None) -> str | None:
    """As it is where it is no path: the settings refuse it by name."""
    return os.fspath(model) if isinstance(model, os.PathLike) else model
