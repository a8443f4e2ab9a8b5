"""How packets reach the device and results the host, and in what order the device works.

Plain memory on a CPU, where work is done at once or by a worker thread; pinned rings and one stream on a GPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, Protocol

import torch

from headway.engine.cpu_stream import CpuStream
from headway.ops.backend import target_of

if TYPE_CHECKING:
    from headway._core import LedgerConfig, Plan

P = ParamSpec("P")


class Staging(Protocol):
    """The memory between ledger and device, and the order of the device's work. A ring at 0 is the ledger's own."""

    @property
    def packet_ring_address(self) -> int: ...
    @property
    def result_ring_address(self) -> int: ...
    @property
    def packet_address(self) -> int:
        """Where the device reads packets; 0 where the newest step brought none."""

    def bring(self, packet_address: int, packet_bytes: int) -> None:
        """Gives the device a step's packet, if there is one."""

    def run(self, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Calls `work` now or later, in order; what it launches on a GPU goes to the engine's stream."""

    def launch(self, run_step: Callable[[Plan], None], plan: Plan, graph_exec: int) -> None:
        """Puts a step behind what was launched: by run_step, or by graph_exec, a cudaGraphExec_t that is the whole step
        but for its packet; 0 where there is none, as ever on a CPU.
        """

    def rest(self) -> None:
        """Gives the processor away while there is nothing to collect."""

    def is_idle(self) -> bool:
        """True when everything launched is done. Raises what the device raised."""

    def synchronize(self) -> None: ...

    def close(self) -> None:
        """Waits for the device, whatever it raised, so that nothing it may still use is freed under it."""


def stage(config: LedgerConfig, device: torch.device) -> Staging:
    if device.type == "cuda":
        return CudaStaging(config, device)
    return WorkerStaging(config) if config.max_launch_depth else HostStaging()


class HostStaging:
    """A CPU reads the ledger's own memory, and has finished whenever it answers."""

    packet_ring_address = 0
    result_ring_address = 0

    def __init__(self) -> None:
        self.packet_address = 0

    def bring(self, packet_address: int, packet_bytes: int) -> None:
        self.packet_address = packet_address

    def run(self, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        work(*args, **kwargs)

    def launch(self, run_step: Callable[[Plan], None], plan: Plan, graph_exec: int) -> None:
        run_step(plan)

    def rest(self) -> None:
        time.sleep(0)

    def is_idle(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass


class WorkerStaging(CpuStream):
    """A CPU whose work is done by a thread of its own, so that steps can be launched ahead.

    The rings live here and not in the ledger: a step in flight outlives an engine that is dropped without being closed.
    """

    def __init__(self, config: LedgerConfig) -> None:
        super().__init__()
        self._packets = torch.zeros(config.packet_ring_bytes, dtype=torch.uint8)
        self._results = torch.zeros(config.result_ring_bytes, dtype=torch.uint8)
        self.packet_ring_address = self._packets.data_ptr()
        self.result_ring_address = self._results.data_ptr()
        self.packet_address = 0  # the worker's alone

    def bring(self, packet_address: int, packet_bytes: int) -> None:
        self.packet_address = packet_address

    def launch(self, run_step: Callable[[Plan], None], plan: Plan, graph_exec: int) -> None:
        self.run(run_step, plan)


class CudaStaging:
    """Pinned rings, and one device buffer that packets are copied to in stream order: one copy a packet.

    The stream is the engine's own: the default one would wait for every other stream of the process. It begins after
    what the current stream holds when this is made, which is how weights and caches came to be.
    """

    def __init__(self, config: LedgerConfig, device: torch.device) -> None:
        self._packets = torch.zeros(config.packet_ring_bytes, dtype=torch.uint8, pin_memory=True)
        self._results = torch.zeros(config.result_ring_bytes, dtype=torch.uint8, pin_memory=True)
        self._packet = torch.zeros(config.packet_ring_bytes, dtype=torch.uint8, device=device)
        self.packet_ring_address = self._packets.data_ptr()
        self.result_ring_address = self._results.data_ptr()
        self.packet_address = self._packet.data_ptr()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._on_stream = torch.cuda.stream(self._stream)
        self._launch_graph = target_of(self._packet).kernels.launch_graph

    def bring(self, packet_address: int, packet_bytes: int) -> None:
        if packet_address:
            begin = packet_address - self.packet_ring_address
            packet = self._packets[begin : begin + packet_bytes]
            self._packet[:packet_bytes].copy_(packet, non_blocking=True)

    def run(self, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        with self._on_stream:
            work(*args, **kwargs)

    def launch(self, run_step: Callable[[Plan], None], plan: Plan, graph_exec: int) -> None:
        """A graph takes one or two calls of the driver: its packet's copy, if it brings one, and its launch. Torch's
        own replay, stream and inference mode around them cost a step of 256 rows some 30 us more (docs/log.md).
        """
        if not graph_exec:
            self.run(run_step, plan)
            return
        news_bytes = plan.packet_bytes if plan.packet_address else 0
        stream, device_idx = self._stream.cuda_stream, self._stream.device_index
        self._launch_graph(
            graph_exec, stream, device_idx, self.packet_address, plan.packet_address, news_bytes
        )

    def rest(self) -> None:
        time.sleep(0)

    def is_idle(self) -> bool:
        return self._stream.query()

    def synchronize(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        with contextlib.suppress(
            RuntimeError
        ):  # the fault of a dead device; whoever waited for results has had it
            self._stream.synchronize()
