"""Host memory of the prefix cache, and the copies to it and back: beside the steps, in the ledger's order.

Which block and which state moves when is the ledger's business (`csrc/core/host_tier.h`). A copy reads and writes no
memory that a launched step names, so copies and steps share no event, and no more do copies out and copies back: on a
GPU each way has a stream, on a CPU a thread, and the ledger hears of each end from the host.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from headway.config import EngineConfig, config_error
from headway.engine.cpu_stream import CpuStream
from headway.engine.memory import MemoryPlan, ModelBytes, free_host_bytes
from headway.engine.stages import Stages
from headway.errors import MemoryBudgetError
from headway.ops.move_records import RecordPools, move_records

if TYPE_CHECKING:
    from headway._core import Ledger, LedgerConfig, Plan, Transfer
    from headway.models.caches import ModelCaches

_ALIGNMENT = 256  # of each tensor's part of the host memory
# Of a GPU. A request waits for what comes back; what leaves has time, and must not hold up the steps beside it.
_THREAD_BLOCKS_BACK, _THREAD_BLOCKS_OUT = 32, 2
_PRIORITY_BACK, _PRIORITY_OUT = -1, 0  # of the stream; lower runs first, and the steps' has 0


@dataclass(frozen=True)
class HostSizes:
    """Records in host memory, none of them a dummy."""

    num_blocks: int = 0
    num_slots: int = 0


NO_HOST_TIER = HostSizes()


def host_sizes(config: EngineConfig, memory: MemoryPlan, sizes: ModelBytes) -> HostSizes:
    """Blocks and states in host memory, in the proportion of the device's. Raises ConfigError or MemoryBudgetError."""
    name, num_bytes = "prefix_host_memory_bytes", config.prefix_host_memory_bytes
    if num_bytes == 0:
        return NO_HOST_TIER
    kv_bytes, state_bytes = memory.num_blocks * sizes.per_block, memory.num_snapshots * sizes.per_slot
    if (
        not config.enable_prefix_caching
        or kv_bytes + state_bytes == 0
        or (sizes.per_slot and not state_bytes)
    ):
        raise config_error(name, num_bytes, "0 where no prefix is cached")
    if (free := free_host_bytes()) < num_bytes:
        raise MemoryBudgetError(f"{name} is {num_bytes}, the machine has {free} bytes free")
    for_blocks = num_bytes * kv_bytes // (kv_bytes + state_bytes)
    num_blocks = for_blocks // sizes.per_block - 1 if sizes.per_block else 0  # less the dummy
    num_slots = (num_bytes - for_blocks) // sizes.per_slot - 1 if sizes.per_slot else 0
    if (sizes.per_block and num_blocks < 1) or (sizes.per_slot and num_slots < 1):
        raise config_error(name, num_bytes, "0, or enough for a few blocks and states of this model")
    return HostSizes(num_blocks, num_slots)


class _Lane(Protocol):
    """Where copies run, one after another. `num_done` raises the fault of one that failed."""

    def run(self, copy: Callable[[], None]) -> None: ...
    def num_done(self) -> int: ...
    def close(self) -> None: ...


class _CpuLane:
    """A thread."""

    def __init__(self) -> None:
        self._stream = CpuStream()

    def run(self, copy: Callable[[], None]) -> None:
        self._stream.run(copy)

    def num_done(self) -> int:
        return self._stream.num_done()

    def close(self) -> None:
        self._stream.close()


class _CudaLane:
    """A stream, and an event behind each copy."""

    def __init__(self, device: torch.device, priority: int) -> None:
        self._stream = torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._pending: deque[tuple[torch.cuda.Event, Callable[[], None]]] = deque()
        self._num_done = 0

    def run(self, copy: Callable[[], None]) -> None:
        """`copy` is kept until it is done, and with it what it reads."""
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            copy()
            done.record()
        self._pending.append((done, copy))

    def num_done(self) -> int:
        while self._pending and self._pending[0][0].query():  # type: ignore[no-untyped-call]
            self._pending.popleft()
            self._num_done += 1
        return self._num_done

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # of a dead device; whoever waited for results has had it
            self._stream.synchronize()


class _Way:
    """Copies out, or back: in their order, whatever those the other way do."""

    def __init__(self, blocks: RecordPools, slots: RecordPools, lane: _Lane, max_thread_blocks: int) -> None:
        self._blocks, self._slots, self.lane = blocks, slots, lane
        self._max_thread_blocks = max_thread_blocks
        self._num_finished = 0

    def begin(self, blocks: torch.Tensor, slots: torch.Tensor) -> None:
        moves = [pair for pair in ((self._blocks, blocks), (self._slots, slots)) if len(pair[1])]
        max_thread_blocks = self._max_thread_blocks

        def copy() -> None:
            for pools, records in moves:
                move_records(pools, records, max_thread_blocks)

        self.lane.run(copy)

    def take_finished(self) -> int:
        num_new = self.lane.num_done() - self._num_finished
        self._num_finished += num_new
        return num_new


class HostTier:
    """One piece of host memory, pinned where the device is a GPU, and the copies of all layers' records.

    Dropped without being closed, it waits for its copies and unpins the memory.
    """

    def __init__(
        self, caches: ModelCaches, state_base: torch.Tensor, config: LedgerConfig, device: torch.device
    ) -> None:
        """state_base [num_slots]: what the device knows of a slot beside what is in it."""
        blocks = (*caches.keys, *caches.values)
        logs = (ring for log in caches.state_log for ring in (log.columns, log.dt, log.raw))
        slots = (*caches.conv_state, *caches.ssm_state, *logs, state_base) if caches.state_pools else ()
        host_blocks, host_slots, memory = _host_twins(
            blocks, config.num_host_blocks + 1, slots, config.num_host_slots + 1
        )
        self._is_pinned = device.type == "cuda"
        lanes: list[_Lane] = (
            [_CudaLane(device, priority) for priority in (_PRIORITY_BACK, _PRIORITY_OUT)]
            if self._is_pinned
            else [_CpuLane(), _CpuLane()]
        )
        if self._is_pinned:
            _pin(memory)
        # Holds the memory, and so what the copies on their way write to, but not this object.
        self._end = weakref.finalize(self, _end, lanes, memory, self._is_pinned)
        pair = partial(RecordPools.pair, device=device)
        back = _Way(pair(host_blocks, blocks), pair(host_slots, slots), lanes[0], _THREAD_BLOCKS_BACK)
        out = _Way(pair(blocks, host_blocks), pair(slots, host_slots), lanes[1], _THREAD_BLOCKS_OUT)
        self._ways = (back, out)

    def begin(self, transfer: Transfer) -> None:
        """Copies now or later, behind all that was begun that way before."""
        self._ways[transfer.is_out].begin(self._staged(transfer.blocks), self._staged(transfer.slots))

    def take_finished(self, is_out: bool) -> int:
        """Transfers out, or back, that ended since this was asked last, the oldest first.

        Raises the fault of one that failed.
        """
        return self._ways[is_out].take_finished()

    def close(self) -> None:
        """Waits for the copies on their way. Legal twice."""
        self._end()

    def _staged(self, records: npt.NDArray[np.int32]) -> torch.Tensor:
        moves = torch.from_numpy(records)
        return moves.pin_memory() if self._is_pinned and len(records) else moves


def with_host_tier(
    stages: Stages, ledger: Ledger, tier: HostTier, settle: Callable[[], None] | None = None
) -> Stages:
    """The same calls; around each plan the ledger hears which copies have ended, and its new ones are begun.

    settle: called before new ones are begun.
    """

    def plan() -> Plan | None:
        for is_out in (False, True):
            for _ in range(tier.take_finished(is_out)):
                ledger.finish_transfer(is_out)
        made = stages.plan()
        transfer = ledger.next_transfer()
        if transfer is not None and settle is not None:
            settle()
        while transfer is not None:
            tier.begin(transfer)
            transfer = ledger.next_transfer()
        return made

    return replace(stages, plan=plan)


def _host_twins(
    blocks: Sequence[torch.Tensor], num_blocks: int, slots: Sequence[torch.Tensor], num_slots: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """For each tensor one of the same records, in one piece of host memory, and that piece."""
    shapes = [
        (num, *tensor.shape[1:])
        for num, group in ((num_blocks, blocks), (num_slots, slots))
        for tensor in group
    ]
    begins, end = [], 0
    for tensor, shape in zip((*blocks, *slots), shapes, strict=True):
        begins.append(end)
        end += -(-math.prod(shape) * tensor.itemsize // _ALIGNMENT) * _ALIGNMENT
    memory = torch.empty(end, dtype=torch.uint8)
    twins = [
        memory[begin : begin + math.prod(shape) * tensor.itemsize].view(tensor.dtype).view(shape)
        for begin, shape, tensor in zip(begins, shapes, (*blocks, *slots), strict=True)
    ]
    return twins[: len(blocks)], twins[len(blocks) :], memory


def _pin(memory: torch.Tensor) -> None:
    """In place: torch's own pinned allocations are as large as the next power of two."""
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)  # type: ignore[no-untyped-call]
    if int(error):
        raise MemoryBudgetError(
            f"{memory.numel()} bytes of host memory for the prefix cache cannot be pinned (CUDA error {int(error)})",
            hint="less prefix_host_memory_bytes",
        )


def _end(lanes: Sequence[_Lane], memory: torch.Tensor, is_pinned: bool) -> None:
    for lane in lanes:
        lane.close()
    if is_pinned:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
