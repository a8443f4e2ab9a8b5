"""How packets reach the device and results the host: plain memory on a CPU, pinned rings on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from headway._core import LedgerConfig


class Staging(Protocol):
    """The memory between ledger and device. An address of 0 leaves the ring to the ledger."""

    @property
    def packet_ring_address(self) -> int: ...
    @property
    def result_ring_address(self) -> int: ...
    def bring(self, packet_address: int, packet_bytes: int) -> int:
        """Address at which the device reads the packet; 0 where there is none."""

    def is_idle(self) -> bool:
        """True when everything launched is done. Raises what the device raised."""

    def synchronize(self) -> None: ...


def stage(config: LedgerConfig, device: torch.device) -> Staging:
    return CudaStaging(config, device) if device.type == "cuda" else HostStaging()


class HostStaging:
    """A CPU reads the ledger's own memory, and has finished whenever it answers."""

    packet_ring_address = 0
    result_ring_address = 0

    def bring(self, packet_address: int, packet_bytes: int) -> int:
        return packet_address

    def is_idle(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class CudaStaging:
    """Pinned rings, and one device buffer that packets are copied to in stream order: one copy a packet."""

    def __init__(self, config: LedgerConfig, device: torch.device) -> None:
        self._packets = torch.zeros(config.packet_ring_bytes, dtype=torch.uint8, pin_memory=True)
        self._results = torch.zeros(config.result_ring_bytes, dtype=torch.uint8, pin_memory=True)
        self._packet = torch.zeros(config.packet_ring_bytes, dtype=torch.uint8, device=device)
        self._device = device

    @property
    def packet_ring_address(self) -> int:
        return self._packets.data_ptr()

    @property
    def result_ring_address(self) -> int:
        return self._results.data_ptr()

    def bring(self, packet_address: int, packet_bytes: int) -> int:
        if not packet_address:
            return 0
        begin = packet_address - self._packets.data_ptr()
        self._packet[:packet_bytes].copy_(self._packets[begin : begin + packet_bytes], non_blocking=True)
        return self._packet.data_ptr()

    def is_idle(self) -> bool:
        return torch.cuda.current_stream(self._device).query()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)
