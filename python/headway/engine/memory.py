"""What fits: KV blocks, state slots and rows for a model on a device, decided before a weight is read.

Pure arithmetic over byte counts; `available_bytes` is the only function that asks the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from headway.config import GIB, MIB, EngineConfig, config_error
from headway.errors import MemoryBudgetError
from headway.fields import flag

DEFAULT_ROWS = {"cpu": 64, "cuda": 256}
DEFAULT_STEP_TOKENS = {"cpu": 2048, "cuda": 8192}
MAX_CPU_CACHE_BYTES = 4 * GIB  # where nothing is set: a laptop's other programs need room too
CPU_SHARE = 0.7
SNAPSHOT_SHARE = 3  # cached states get one part in so many of what the rows leave, or all that KV cannot fill
SNAPSHOTS_PER_ROW = 8  # at most, where nothing is set
MIN_MODEL_LEN = 64  # tokens; a fitted length below this is refused as useless


@dataclass(frozen=True)
class ModelBytes:
    """Sizes of one model, from its configuration alone."""

    weights: int
    per_block: int  # KV of one block, all attention layers; 0 without attention
    per_slot: int  # conv and SSM state of one request, all Mamba layers; 0 without Mamba
    per_step_token: int  # widest activations of a token in flight
    per_sampled_row: int  # logits and what the sampler keeps beside them
    max_position: int


@dataclass(frozen=True)
class MemoryLine:
    name: str
    num_bytes: int
    detail: str


@dataclass(frozen=True)
class MemoryPlan:
    """The sizes everything is allocated with. Counts exclude the dummies at index 0."""

    max_rows: int
    max_step_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    num_slots: int
    num_snapshots: int  # slots beside those, for the states of cached prefixes
    slot_bytes: int  # of one, all Mamba layers
    budget_bytes: int
    lines: tuple[MemoryLine, ...]

    @property
    def total_bytes(self) -> int:
        return sum(line.num_bytes for line in self.lines)

    def __str__(self) -> str:
        """The table printed at start-up."""
        rows = [
            *self.lines,
            MemoryLine("total", self.total_bytes, f"of {_human(self.budget_bytes)} available"),
        ]
        width = max(len(row.name) for row in rows)
        return "\n".join(f"{row.name:<{width}}  {_human(row.num_bytes):>10}  {row.detail}" for row in rows)


def plan_memory(config: EngineConfig, model: ModelBytes, device_type: str, free_bytes: int) -> MemoryPlan:
    """Sizes every pool within the budget. Raises MemoryBudgetError naming a flag and a value that fits."""
    return _Fit(config, model, device_type, free_bytes).plan()


class _Fit:
    """Weights and workspace first, then rows and slots, then blocks of one sequence at least, then the rest."""

    def __init__(self, config: EngineConfig, model: ModelBytes, device_type: str, free_bytes: int) -> None:
        self.config = config
        self.model = model
        self.device_type = device_type
        self.budget = free_bytes
        if config.max_model_len is not None and config.max_model_len > model.max_position:
            limit = f"at most {model.max_position}, the model's limit"
            raise config_error("max_model_len", config.max_model_len, limit)
        self.max_model_len = config.max_model_len or model.max_position
        rows = config.max_num_seqs or DEFAULT_ROWS[device_type]
        self.step_tokens = config.max_num_batched_tokens or max(DEFAULT_STEP_TOKENS[device_type], rows)
        self.rows = min(rows, self.step_tokens)

    def plan(self) -> MemoryPlan:
        cache_bytes = self._cache_budget()
        self._fit_rows(cache_bytes)
        num_slots = self._num_slots()
        left = cache_bytes - self._rows_bytes(self.rows)
        num_snapshots = self._num_snapshots(left)
        num_blocks = self._fit_blocks(left - num_snapshots * self.model.per_slot)
        return MemoryPlan(
            max_rows=self.rows,
            max_step_tokens=self.step_tokens,
            max_model_len=self.max_model_len,
            block_size=self.config.block_size,
            num_blocks=num_blocks,
            num_slots=num_slots,
            num_snapshots=num_snapshots,
            slot_bytes=self.model.per_slot,
            budget_bytes=self.budget,
            lines=self._lines(num_blocks, num_slots, num_snapshots),
        )

    def _cache_budget(self) -> int:
        """Bytes for blocks, slots and rows."""
        fixed = self.model.weights + self._workspace_bytes(self.rows)
        left = self.budget - fixed
        asked = self.config.kv_cache_memory_bytes
        least = self._one_sequence_bytes(MIN_MODEL_LEN)
        if asked is not None and asked < least:
            message = (
                f"a short request needs {_human(least)} of cache, kv_cache_memory_bytes is {_human(asked)}"
            )
            raise MemoryBudgetError(message, hint=f"{flag('kv_cache_memory_bytes')} {least} would fit")
        needed = least if asked is None else asked
        if left < needed:
            raise self._too_small(fixed + needed)
        if asked is not None:
            return asked
        return min(left, MAX_CPU_CACHE_BYTES) if self.device_type == "cpu" else left

    def _fit_rows(self, cache_bytes: int) -> None:
        """Lowers the number of rows, unless it was asked for, so that at most half the cache is their state."""
        most = self.rows
        share = cache_bytes if self.config.max_num_seqs else cache_bytes // 2
        while (
            most > 1 and self._rows_bytes(most) + self._blocks_bytes(self._blocks_of(MIN_MODEL_LEN)) > share
        ):
            most -= max(1, most // 16)
        if most == self.rows:
            return
        if self.config.max_num_seqs:
            raise _refusal("max_num_seqs", self.rows, self._rows_bytes(self.rows), cache_bytes, most)
        self.rows = most

    def _num_slots(self) -> int:
        return 0 if self.model.per_slot == 0 else self.config.num_state_slots or self.rows

    def _num_snapshots(self, left: int) -> int:
        """As many as the share holds; fewer where one sequence's blocks would not fit beside them."""
        if not self.config.enable_prefix_caching or self.model.per_slot == 0:
            return 0
        asked = self.config.snapshot_memory_bytes
        is_fixed_len = asked is None or self.config.max_model_len is not None
        longest = self.max_model_len if is_fixed_len else MIN_MODEL_LEN
        needed = self._blocks_bytes(self._blocks_of(longest)) if self.model.per_block else 0
        if asked is not None:
            if asked + needed > left:
                raise _refusal("snapshot_memory_bytes", asked, asked + needed, left, left - needed)
            return asked // self.model.per_slot
        spare = (
            left - self._blocks_bytes(self.rows * self._blocks_of(longest)) if self.model.per_block else left
        )
        most = min(max(left // SNAPSHOT_SHARE, spare), left - needed) // self.model.per_slot
        return max(0, min(most, SNAPSHOTS_PER_ROW * self.rows))

    def _fit_blocks(self, left: int) -> int:
        """Blocks for all rows at full length, or as many as fit; shortens max_model_len when it was not asked for."""
        if self.model.per_block == 0:
            return 0
        fitting = left // self.model.per_block - 1
        needed = self._blocks_of(self.max_model_len)
        if fitting < needed:
            longest = fitting * self.config.block_size
            if self.config.max_model_len is not None or longest < MIN_MODEL_LEN:
                raise _refusal("max_model_len", self.max_model_len, self._blocks_bytes(needed), left, longest)
            self.max_model_len = longest
        return min(fitting, self.rows * needed)

    def _blocks_of(self, num_tokens: int) -> int:
        return -(-min(num_tokens, self.max_model_len) // self.config.block_size)

    def _blocks_bytes(self, num_blocks: int) -> int:
        return (num_blocks + 1) * self.model.per_block

    def _rows_bytes(self, rows: int) -> int:
        """State slots and the device's mirror of `rows` requests, dummies included."""
        slots = self.config.num_state_slots or rows
        return (slots + 1) * self.model.per_slot + (rows + 1) * self._row_bytes()

    def _row_bytes(self) -> int:
        """History and block table, both int32, and the per-row lists of csrc/core/step_layout.h."""
        num_blocks = self._blocks_of(self.max_model_len) if self.model.per_block else 1
        return 4 * (self.max_model_len + num_blocks) + 4 * (64 + 2 * 512) + 256

    def _workspace_bytes(self, rows: int) -> int:
        return self.step_tokens * self.model.per_step_token + rows * self.model.per_sampled_row

    def _one_sequence_bytes(self, num_tokens: int) -> int:
        return self._rows_bytes(1) + self._blocks_bytes(self._blocks_of(num_tokens))

    def _lines(self, num_blocks: int, num_slots: int, num_snapshots: int) -> tuple[MemoryLine, ...]:
        model = self.model
        size = self.config.block_size
        kv_detail = f"{num_blocks} blocks of {size} tokens = {num_blocks * size} tokens"
        return (
            MemoryLine("weights", model.weights, ""),
            MemoryLine("KV cache", (num_blocks + 1) * model.per_block if num_blocks else 0, kv_detail),
            MemoryLine(
                "state slots", (num_slots + 1) * model.per_slot if num_slots else 0, f"{num_slots} slots"
            ),
            MemoryLine("cached states", num_snapshots * model.per_slot, f"{num_snapshots} snapshots"),
            MemoryLine(
                "rows",
                (self.rows + 1) * self._row_bytes(),
                f"{self.rows} requests of at most {self.max_model_len} tokens",
            ),
            MemoryLine(
                "workspace", self._workspace_bytes(self.rows), f"steps of at most {self.step_tokens} tokens"
            ),
        )

    def _too_small(self, needed: int) -> MemoryBudgetError:
        caches = "a short request" if self.config.kv_cache_memory_bytes is None else "the caches asked for"
        message = f"weights, workspace and {caches} need {_human(needed)} of {_human(self.budget)}"
        hints = []
        if (tokens := self._fitting_step_tokens(needed)) >= self.rows:
            hints.append(f"{flag('max_num_batched_tokens')} {tokens} would fit")
        if self.device_type == "cpu":
            hints.append(f"set {flag('cpu_memory_bytes')} {-(-needed // MIB)}MiB if there is that much")
        else:
            hints.append("use a GPU with more memory, a narrower --dtype, or more --gpu-memory-utilization")
        return MemoryBudgetError(message, hint="; or ".join(hints))

    def _fitting_step_tokens(self, needed: int) -> int:
        """Tokens of a step that would bring `needed` bytes down to the budget; may be negative."""
        over = needed - self.budget
        return self.step_tokens - -(-over // max(self.model.per_step_token, 1))


def _refusal(name: str, value: int, needed: int, left: int, fitting: int) -> MemoryBudgetError:
    message = f"{name} = {value} needs {_human(needed)} of cache, {_human(left)} are left"
    hint = f"{flag(name)} {fitting} would fit" if fitting > 0 else "give the caches more memory"
    return MemoryBudgetError(message, hint=hint)


def available_bytes(config: EngineConfig, device: torch.device) -> int:
    """The budget: this engine's share of the GPU less what others hold, or the free part of the machine."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - (1 - config.gpu_memory_utilization) * total)
    return config.cpu_memory_bytes or int(CPU_SHARE * free_host_bytes())


def free_host_bytes() -> int:
    """MemAvailable, or less where a control group allows less."""
    free = _meminfo_available()
    limit, used = (_read_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, max(limit - used, 0))
    return free


def _meminfo_available() -> int:
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 8 * GIB  # no /proc: assume a modest machine


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _human(num_bytes: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", MIB)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB"
