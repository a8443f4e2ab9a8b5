"""Headway serves hybrid language models (Mamba-2, attention, MLP, MoE). Importing it does not import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.aio import AsyncLLM
    from headway.config import EngineConfig
    from headway.errors import (
        BuildError,
        CapacityError,
        ConfigError,
        EngineDeadError,
        HeadwayError,
        IntegrityError,
        MemoryBudgetError,
        ModelLoadError,
        OverloadedError,
        RequestError,
        ServerError,
    )
    from headway.llm import LLM
    from headway.outputs import CompletionOutput, Delta, Logprob, RequestMetrics, RequestOutput
    from headway.request import RequestOutputKind, SamplingParams, TextPrompt, TokensPrompt

__version__ = "0.1.0"

_ERRORS = (
    "BuildError",
    "CapacityError",
    "ConfigError",
    "EngineDeadError",
    "HeadwayError",
    "IntegrityError",
    "MemoryBudgetError",
    "ModelLoadError",
    "OverloadedError",
    "RequestError",
    "ServerError",
)
_HOMES = {
    "LLM": "headway.llm",
    "AsyncLLM": "headway.aio",
    "EngineConfig": "headway.config",
    "RequestOutputKind": "headway.request",
    "SamplingParams": "headway.request",
    "TextPrompt": "headway.request",
    "TokensPrompt": "headway.request",
    "CompletionOutput": "headway.outputs",
    "Delta": "headway.outputs",
    "Logprob": "headway.outputs",
    "RequestMetrics": "headway.outputs",
    "RequestOutput": "headway.outputs",
    **dict.fromkeys(_ERRORS, "headway.errors"),
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BuildError",
    "CapacityError",
    "CompletionOutput",
    "ConfigError",
    "Delta",
    "EngineConfig",
    "EngineDeadError",
    "HeadwayError",
    "IntegrityError",
    "Logprob",
    "MemoryBudgetError",
    "ModelLoadError",
    "OverloadedError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ServerError",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'headway' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:  # torch and its like: imported here first
        from headway.errors import BuildError

        if error.name is None or error.name.split(".")[0] == "headway":
            raise
        raise BuildError(f"{error.name} is not installed", hint=f"pip install {error.name}") from error


def __dir__() -> list[str]:
    return sorted(__all__)
