"""How packets reach the device and results the host: plain memory on a CPU, pinned rings and one stream on a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from headway._core import LedgerConfig


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

    def on_stream(self) -> AbstractContextManager[object]:
        """Within it, what torch launches goes to the engine's stream. Not to be entered twice."""

    def is_idle(self) -> bool:
        """True when everything launched is done. Raises what the device raised."""

    def synchronize(self) -> None: ...


def stage(config: LedgerConfig, device: torch.device) -> Staging:
    return CudaStaging(config, device) if device.type == "cuda" else HostStaging()


class HostStaging:
    """A CPU reads the ledger's own memory, and has finished whenever it answers."""

    packet_ring_address = 0
    result_ring_address = 0

    def __init__(self) -> None:
        self.packet_address = 0

    def bring(self, packet_address: int, packet_bytes: int) -> None:
        self.packet_address = packet_address

    def on_stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def is_idle(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


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

    def bring(self, packet_address: int, packet_bytes: int) -> None:
        if packet_address:
            begin = packet_address - self.packet_ring_address
            packet = self._packets[begin : begin + packet_bytes]
            self._packet[:packet_bytes].copy_(packet, non_blocking=True)

    def on_stream(self) -> AbstractContextManager[object]:
        return self._on_stream

    def is_idle(self) -> bool:
        return self._stream.query()

    def synchronize(self) -> None:
        self._stream.synchronize()
