"""The engines that bench/engine.py and bench/prefix.py time, behind one face: Headway, and vLLM where it is installed.

Each side is a process of its own, since their torch and Triton caches, memory pools and workers must not meet. Both get
the same checkpoint or shape, the same prompts as ids, greedy sampling without end tokens and no text.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

MODELS = Path(__file__).parent / "models"
ALIASES = {"nano9b": "nemotron-nano-9b-v2", "nano30b": "nemotron-3-nano-30b-a3b"}


@dataclass(frozen=True)
class SideOptions:
    """What both engines are told alike."""

    model: str  # a file of bench/models (small, nano9b, nano30b) or a checkpoint folder
    load_format: str = "dummy"  # "auto" where the folder has weights
    max_model_len: int = 8192
    max_num_seqs: int = 256
    has_prefix_cache: bool = False
    device: str = "auto"
    dtype: str = "auto"
    launch_depth: int | None = None  # Headway's alone, likewise below
    is_eager: bool = False


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    num_cached_tokens: int
    first_token_s: float  # from the call to the request's first token


class Side(Protocol):
    """An engine under test. Its calls return when the last token of the batch is there."""

    vocab_size: int

    def describe(self) -> dict[str, Any]: ...
    def generate(
        self, prompts: Sequence[list[int]], num_new: int, on_step: Callable[[], None] | None = None
    ) -> list[int]:
        """Number of new tokens of each prompt."""
        ...

    def answer(self, prompts: Sequence[list[int]], num_new: int) -> list[Answer]:
        """`generate` with the time to each prompt's first token, as a reader of the stream sees it."""
        ...

    def reset_prefix_cache(self) -> None: ...
    def close(self) -> None: ...


class HeadwaySide:
    def __init__(self, options: SideOptions) -> None:
        from headway import LLM, SamplingParams

        self._params = SamplingParams
        self.llm = LLM(
            model_path(options.model),
            load_format=options.load_format,
            device=options.device,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            gpu_memory_utilization=0.85,
            launch_depth=options.launch_depth,
            enforce_eager=options.is_eager,
            enable_prefix_caching=options.has_prefix_cache,
        )
        self.vocab_size = self.llm.vocab_size

    def describe(self) -> dict[str, Any]:
        from headway import __version__

        graphs = getattr(self.llm._engine._runner, "graphs", None)
        captured = [] if graphs is None else graphs.captured
        return {"engine": f"headway {__version__}", **self.llm.describe(), "graphs": captured}

    def generate(
        self, prompts: Sequence[list[int]], num_new: int, on_step: Callable[[], None] | None = None
    ) -> list[int]:
        hook = None if on_step is None else lambda _: on_step()
        outputs = self.llm.generate(list(prompts), greedy(self._params, num_new), on_step=hook)
        return [len(output.outputs[0].token_ids) for output in outputs]

    def answer(self, prompts: Sequence[list[int]], num_new: int) -> list[Answer]:
        begin_s = time.perf_counter()
        answers = []
        for output in self.llm.generate(list(prompts), greedy(self._params, num_new)):
            assert output.metrics.first_token_s is not None
            first_s = output.metrics.first_token_s - begin_s
            answers.append(Answer(output.outputs[0].token_ids, output.num_cached_tokens or 0, first_s))
        return answers

    def reset_prefix_cache(self) -> None:
        self.llm.reset_prefix_cache()

    def close(self) -> None:
        self.llm.close()


class VllmSide:
    """vLLM as its users run it: asynchronous scheduling, full graphs for decode, fp32 state, no statistics."""

    def __init__(self, options: SideOptions) -> None:
        for name, value in {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",  # compiled at its first use, and what is drawn here is greedy
        }.items():
            os.environ.setdefault(name, value)
        import vllm

        self._made_folder = tempfile.TemporaryDirectory(
            prefix="bench-model-"
        )  # read until the engine is gone
        folder = vllm_folder(model_path(options.model), Path(self._made_folder.name))
        self.llm = vllm.LLM(
            model=str(folder),
            load_format=options.load_format,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            gpu_memory_utilization=0.85,
            enable_prefix_caching=options.has_prefix_cache,
            disable_log_stats=True,
        )
        self._params = vllm.SamplingParams
        self._numbers = itertools.count()
        self._version: str = vllm.__version__
        self.vocab_size = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])

    def describe(self) -> dict[str, Any]:
        return {"engine": f"vllm {self._version}", "device": "cuda", "dtype": "bfloat16"}

    def generate(
        self, prompts: Sequence[list[int]], num_new: int, on_step: Callable[[], None] | None = None
    ) -> list[int]:
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(requests, greedy(self._params, num_new), use_tqdm=False)
        if on_step is not None:
            on_step()
        return [len(output.outputs[0].token_ids) for output in outputs]

    def answer(self, prompts: Sequence[list[int]], num_new: int) -> list[Answer]:
        engine = self.llm.llm_engine
        begin_s = time.perf_counter()
        first_s: dict[str, float] = {}
        last: dict[str, Any] = {}
        names = [str(next(self._numbers)) for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, greedy(self._params, num_new))
        while engine.has_unfinished_requests():
            for output in engine.step():
                first_s.setdefault(output.request_id, time.perf_counter() - begin_s)
                last[output.request_id] = output
        return [
            Answer(list(last[name].outputs[0].token_ids), last[name].num_cached_tokens or 0, first_s[name])
            for name in names
        ]

    def reset_prefix_cache(self) -> None:
        self.llm.reset_prefix_cache()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        self._made_folder.cleanup()


SIDES: dict[str, Callable[[SideOptions], Side]] = {"headway": HeadwaySide, "vllm": VllmSide}


def greedy(sampling_params: Callable[..., Any], num_new: int) -> Any:
    """Either engine's parameters for `num_new` tokens as ids, whatever they are; both take vLLM's names."""
    return sampling_params(temperature=0.0, max_tokens=num_new, ignore_eos=True, detokenize=False)


def model_path(name: str) -> str:
    """A file of bench/models by name, or any checkpoint folder."""
    known = MODELS / f"{ALIASES.get(name, name)}.json"
    return str(known) if known.is_file() else name


def vllm_folder(path: str, spare: Path) -> Path:
    """A folder that vLLM can read: the one given, or `spare` for a lone config.json."""
    if Path(path).is_dir():
        return Path(path)
    config = for_peers(json.loads(Path(path).read_text(encoding="utf-8")))
    (spare / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return spare


def for_peers(config: dict[str, Any]) -> dict[str, Any]:
    """A published configuration with what other readers of this family ask for and Headway does not."""
    asked = {"time_step_limit": [0.0, 1e9], "num_logits_to_keep": 1, "use_mamba_kernels": True}
    if "head_dim" in config:
        asked["attention_head_dim"] = config["head_dim"]
    return asked | config


class Clock:
    """Seconds since it was made, and a limit on them."""

    def __init__(self, limit_s: float) -> None:
        self._begin_s = time.perf_counter()
        self._limit_s = limit_s

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self._begin_s

    def check(self) -> None:
        if self.elapsed_s > self._limit_s:
            raise OutOfTimeError


class OutOfTimeError(Exception):
    """The run has used up --time-limit."""
