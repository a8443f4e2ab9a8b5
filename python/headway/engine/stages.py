"""The five calls of a step by name, so that something can stand around each: a clock or an NVTX range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from headway._core import Commit, Ledger, Plan
    from headway.engine.completion import Completion
    from headway.ops import StepBuffers

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Stages:
    """What `Engine.step` calls, in this order."""

    plan: Callable[[], Plan | None]
    launch: Callable[[Plan], None]
    collect: Callable[[Callable[[], bool]], None]  # waits for the oldest step's results
    commit: Callable[[], Commit | None]
    outputs: Callable[[Commit, float], list[Completion]]


def with_mirror_checks(stages: Stages, ledger: Ledger, read_mirror: Callable[[], StepBuffers]) -> Stages:
    """The same calls; after each commit host truth is compared with the device, all rows and fields.

    A debug mode: it waits for the device at every step. The first difference raises IntegrityError.
    """

    def commit() -> Commit | None:
        changes = stages.commit()
        mirror = read_mirror()  # named: its addresses are of memory that it holds
        ledger.check_mirror(mirror.mirror_arguments)
        return changes

    return replace(stages, commit=commit)


def with_poisoned_slots(
    stages: Stages, ledger: Ledger, poison_slots: Callable[[Sequence[int]], None]
) -> Stages:
    """The same calls; before each plan, the state slots that are free are poisoned.

    A debug mode: whoever reads a slot that was given back, or one before it was written, reads NaN. A slot that
    changes hands within one plan is never free and keeps what it holds.
    """

    def plan() -> Plan | None:
        poison_slots(ledger.free_slots())
        return stages.plan()

    return replace(stages, plan=plan)


def with_nvtx_ranges(stages: Stages) -> Stages:
    """The same calls, each in a range of its name that Nsight Systems shows."""
    return Stages(
        plan=_in_range("plan", stages.plan),
        launch=_in_range("launch", stages.launch),
        collect=_in_range("collect", stages.collect),
        commit=_in_range("commit", stages.commit),
        outputs=_in_range("outputs", stages.outputs),
    )


def _in_range(name: str, call: Callable[P, R]) -> Callable[P, R]:
    def ranged(*args: P.args, **kwargs: P.kwargs) -> R:
        torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
        try:
            return call(*args, **kwargs)
        finally:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    return ranged
