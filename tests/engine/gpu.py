"""The shipped model on a GPU, in a small engine, and traces for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from headway.config import EngineConfig
from headway.engine.assemble import model_bytes
from headway.engine.memory import plan_memory
from headway.engine.state_window import choose_window
from headway.llm import LLM
from headway.models.registry import read_model_config
from tests.engine.driving import prompt_of
from tests.engine.traces import random_trace

MAX_STEP_TOKENS = 192
INVARIANT: dict[str, Any] = {"batch_invariant": True, "enable_prefix_caching": False}
DEFAULTS: dict[str, Any] = {"max_num_seqs": 6, "max_num_batched_tokens": MAX_STEP_TOKENS}


def tiny_pools(folder: Path, launch_depth: int, num_blocks: int = 24) -> dict[str, Any]:
    """Settings of an engine with so few blocks, two sequences' worth, that its six rows evict each other."""
    settings: dict[str, Any] = {"launch_depth": launch_depth, "max_model_len": 192}
    config = EngineConfig(**DEFAULTS, **{**settings, "enable_prefix_caching": False})
    model, dtype = read_model_config(folder), torch.bfloat16
    sizes = model_bytes(
        model, config.block_size, dtype, choose_window(config, model, "cuda", dtype, launch_depth)
    )
    lines = {line.name: line.num_bytes for line in plan_memory(config, sizes, "cuda", 8 * 2**30).lines}
    cache_bytes = lines["state slots"] + lines["rows"] + (num_blocks + 1) * sizes.per_block
    return {**settings, "kv_cache_memory_bytes": cache_bytes}


@contextmanager
def gpu_llm(folder: Path, **settings: Any) -> Iterator[LLM]:
    defaults = {"device": "cuda", "dtype": "bfloat16", "max_model_len": 512, **DEFAULTS}
    llm = LLM(folder, **{**defaults, **settings})
    try:
        yield llm
    finally:
        llm.close()


def tiny_trace(seed: int, **changes: Any) -> Any:
    settings: dict[str, Any] = {"max_prompt_len": 150, "max_tokens": 24, "stops": ["e", "\n\n"]}
    return random_trace(seed, **{"prompt_of": prompt_of, **settings, **changes})
