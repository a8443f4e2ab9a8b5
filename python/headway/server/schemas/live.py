"""What the page at `/` polls: totals, from which it makes rates, and the last steps."""

from __future__ import annotations

import msgspec


class Pool(msgspec.Struct):
    """Blocks or slots: these four are all there are."""

    used: int
    cached: int
    fenced: int
    free: int


class LiveStep(msgspec.Struct):
    """Times from the begin of the first step shown."""

    begin_us: float
    end_us: float
    num_rows: int
    num_decode_rows: int
    num_tokens: int


class LiveResponse(msgspec.Struct):
    """time_s is of no particular clock: differences count."""

    model: str
    device: str
    time_s: float
    num_running: int
    num_waiting: int
    num_steps_in_flight: int
    num_output_tokens_total: int
    num_looked_up_tokens_total: int
    num_cached_tokens_total: int
    device_busy_s: float
    device_idle_s: float
    kv_blocks: Pool
    state_slots: Pool
    steps: list[LiveStep]
