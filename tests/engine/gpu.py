"""The shipped model on a GPU, in a small engine, and traces for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headway.llm import LLM
from tests.engine.driving import prompt_of
from tests.engine.traces import random_trace

MAX_STEP_TOKENS = 192


@contextmanager
def gpu_llm(folder: Path, **settings: Any) -> Iterator[LLM]:
    defaults = {"max_num_seqs": 6, "max_model_len": 512, "max_num_batched_tokens": MAX_STEP_TOKENS}
    llm = LLM(folder, **{"device": "cuda", "dtype": "bfloat16", **defaults, **settings})
    try:
        yield llm
    finally:
        llm.close()


def tiny_trace(seed: int, **changes: Any) -> Any:
    settings: dict[str, Any] = {"max_prompt_len": 150, "max_tokens": 24, "stops": ["e", "\n\n"]}
    return random_trace(seed, **{"prompt_of": prompt_of, **settings, **changes})
