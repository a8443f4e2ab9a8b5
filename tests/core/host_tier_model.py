"""The prefix cache's host tier in plain Python: what moves out of the tree and back, and what each record then holds.

Plays the device as well: every block and slot holds the path it was written for, copies carry that along, and at every
look each node's records must hold the node's own path. What host memory forgets is the tier's choice, where it is full.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tests.core.prefix_model import Node, Path, PrefixModel


@dataclass(frozen=True)
class Held:
    """What a node owns; 0: none."""

    block: int = 0
    slot: int = 0
    is_anchor: bool = False
    has_log: bool = False


Contents = dict[Path, Held]
Moves = list[tuple[int, int]]
State = tuple[Path, bool]  # where it was taken, and whether it has a log


def contents(words: Iterable[str]) -> Contents:
    found: Contents = {}
    for word in words:
        salt, tokens, block, slot, kind = word.split("/")
        found[salt, tokens] = Held(int(block), int(slot), kind.startswith("anchor"), kind.endswith("+log"))
    return found


@dataclass
class Memory:
    blocks: dict[int, Path] = field(default_factory=dict)
    slots: dict[int, State] = field(default_factory=dict)

    def copy_to(self, other: Memory, blocks: Moves, slots: Moves) -> None:
        for source, target in blocks:
            other.blocks[target] = self.blocks[source]
        for source, target in slots:
            other.slots[target] = self.slots[source]

    def check(self, known: Contents) -> None:
        for path, held in known.items():
            assert not held.block or self.blocks[held.block] == path, "a block holds another node's tokens"
            is_own = not held.slot or self.slots[held.slot] == (path, held.has_log)
            assert is_own, "a slot holds another state than its snapshot's"


@dataclass
class Transfer:
    is_out: bool
    blocks: Moves
    slots: Moves
    path: Path = ("", "")  # of what comes back
    kv: int = 0  # tokens of it that the device has
    is_void: bool = False


class HostTierModel:
    def __init__(
        self, tree: PrefixModel, num_blocks: int, num_slots: int, max_nodes: int, *, copies_late: bool
    ) -> None:
        self.tree, self.limits, self.copies_late = tree, (num_blocks, num_slots, max_nodes), copies_late
        self.device_memory, self.host_memory = Memory(), Memory()
        self.host: Contents = {}
        self.saves: deque[Transfer] = deque()
        self.loads: deque[Transfer] = deque()

    def move(self, direction: str, blocks: Moves, slots: Moves) -> None:
        transfer = Transfer(direction == "out", blocks, slots)
        (self.saves if transfer.is_out else self.loads).append(transfer)
        if not self.copies_late:
            self.copy(transfer)

    def copy(self, transfer: Transfer) -> None:
        ends = (self.device_memory, self.host_memory)
        source, target = ends if transfer.is_out else ends[::-1]
        source.copy_to(target, transfer.blocks, transfer.slots)

    def seek(self, path: Path, end: int) -> None:
        salt, tokens = path
        kv, start = self.tree.find(salt, tokens)
        best = (e for e in range(len(tokens), start, -1) if self.is_whole((salt, tokens[:e]), kv))
        assert end == next(best, 0), "another prefix is found in host memory than the longest that is whole"

    def is_whole(self, path: Path, kv: int) -> bool:
        """Whether a request could go on behind the path, its first `kv` tokens being on the device."""
        above = [p for p in self.tree.parents(path) if len(p[1]) > kv or len(p[1]) % self.tree.block_size]
        if path not in self.host or (self.tree.has_states and not self.host[path].slot):
            return False
        return not self.tree.has_blocks or all(p in self.host and self.host[p].block for p in above)

    def save(self, before: Contents, after: Contents, host: Contents) -> None:
        self.expect(before)
        old, is_full = self.host, self.is_full(host)
        assert after.keys() <= before.keys(), "something came in while things moved out"
        left = before.keys() - after.keys()
        leaves = {p for p in left if before[p].is_anchor and len(p[1]) % self.tree.block_size}
        self.remove(left, may_jump=leaves)
        thinned = {p for p in after if before[p].slot and not after[p].slot}
        for path in thinned:
            assert before[path].is_anchor, "a state moved out that is on a prompt's way"
            assert self.tree.nodes[path].pins == 0, "a state moved out that somebody holds"
            self.tree.nodes[path].has_snapshot = False
        for path in left | thinned:
            was, now = before[path], host.get(path, Held())
            is_kept = was.is_anchor or not self.tree.has_states or any(self.below(path, host))
            assert is_full or now.slot or not was.is_anchor, "a state was lost on its way out"
            assert is_full or now.block or path in thinned or not (is_kept and was.block), "a block was lost"
        moved_blocks = {move for t in self.saves for move in t.blocks}
        moved_slots = {move for t in self.saves for move in t.slots}
        for path, now in host.items():
            was = old.get(path, Held())
            if now.block and not was.block:
                assert (before[path].block, now.block) in moved_blocks, "a block is in host memory uncopied"
            if now.slot and not was.slot:
                assert (before[path].slot, now.slot) in moved_slots, "a state is in host memory uncopied"
        is_forgetful = any(old[p] != host.get(p) for p in old if old[p].block or old[p].slot)
        assert is_full or not is_forgetful or self.only_gained(old, host), "host memory forgot without need"
        for path in {p for p in old if old[p].block and not host.get(p, Held()).block}:
            kept = {p for p in self.below(path, host) if p in old and p not in left | thinned}
            assert not kept, "host memory forgot a block and kept what needs it"
        self.host = host
        self.look(after)

    def load(self, path: Path, before: Contents, after: Contents, host: Contents) -> None:
        self.expect(before)
        assert host == self.host, "host memory changed while something was read from it"
        salt, tokens = path
        kv, _ = self.tree.find(salt, tokens)
        chain = self.chain(path, kv)
        for held in self.tree.parents((salt, tokens[:kv])):
            self.tree.nodes[held].pins += 1
        self.remove(before.keys() - after.keys())
        transfer = self.loads[-1]
        blocks = [host[p].block for p in chain] if self.tree.has_blocks else []
        assert [source for source, _ in transfer.blocks] == blocks, (
            "other blocks come back than those that miss"
        )
        slots = [host[path].slot] if self.tree.has_states else []
        assert [source for source, _ in transfer.slots] == slots, "another state comes back"
        taken = {held.block for held in after.values()}
        assert not any(target in taken for _, target in transfer.blocks), "a block comes back to one in use"
        transfer.path, transfer.kv = path, kv
        self.look(after)

    def finish(self, direction: str, before: Contents, after: Contents, host: Contents) -> None:
        self.expect(before)
        assert host == self.host, "host memory changed when a copy was done"
        transfer = (self.saves if direction == "out" else self.loads).popleft()
        if self.copies_late:
            self.copy(transfer)
        if transfer.is_out or transfer.is_void:
            assert after == before, "the tree changed though nothing came back"
        else:
            self.enter(transfer, before, after)
        self.look(after)

    def enter(self, transfer: Transfer, before: Contents, after: Contents) -> None:
        salt, tokens = transfer.path
        deepest = (salt, tokens[: transfer.kv])
        chain = self.chain(transfer.path, transfer.kv)
        gone = before.keys() - after.keys()
        for path in chain:
            if path not in after:
                break
            self.tree.nodes.setdefault(path, Node()).pins += 1
            deepest = path
        assert not self.tree.has_blocks or (deepest == transfer.path and not gone), "a block found no node"
        self.remove(gone)
        if deepest == transfer.path and self.tree.has_states:
            self.tree.nodes[deepest].has_snapshot = True
            had = before.get(deepest, Held()).slot
            assert after[deepest].slot == (had or transfer.slots[0][1]), "another state came back"
        self.tree.unpin(deepest)

    def chain(self, path: Path, kv: int) -> list[Path]:
        """What is between the device's tokens and the path's end, the shortest first."""
        return [p for p in reversed(self.tree.parents(path)) if len(p[1]) > kv]

    def remove(self, gone: Iterable[Path], may_jump: Iterable[Path] = ()) -> None:
        """From the tree: the deepest first, and none before what was used longer ago."""
        gone, jumped = set(gone), set(may_jump)
        in_order = gone - jumped
        if in_order:
            newest = max(self.tree.nodes[p].last_use for p in in_order)
            free = {p for p, node in self.tree.nodes.items() if node.pins == 0 and node.last_use <= newest}
            assert free <= gone, "a node went before one that was used longer ago"
        for path in sorted(gone, key=lambda p: -len(p[1])):
            self.tree.remove(path)

    def reset(self) -> None:
        self.host = {}
        for transfer in self.loads:
            transfer.is_void = True

    def expect(self, device: Contents) -> None:
        assert device.keys() == self.tree.nodes.keys(), "other nodes are on the device"
        known = {path for path, node in self.tree.nodes.items() if node.has_snapshot}
        assert {p for p, held in device.items() if held.slot} == known, "other snapshots are on the device"

    def look(self, device: Contents) -> None:
        self.expect(device)
        self.device_memory.check(device)
        if not self.copies_late or not (self.saves or self.loads):
            self.host_memory.check(self.host)
        num_blocks, num_slots, max_nodes = self.limits
        assert self.num_blocks(self.host) <= num_blocks
        assert self.num_slots(self.host) <= num_slots
        assert len(self.host) <= max_nodes

    @staticmethod
    def num_blocks(host: Contents) -> int:
        return sum(held.block > 0 for held in host.values())

    @staticmethod
    def num_slots(host: Contents) -> int:
        return sum(held.slot > 0 for held in host.values())

    def is_full(self, host: Contents) -> bool:
        used = (self.num_blocks(host), self.num_slots(host), len(host))
        return any(num == limit > 0 for num, limit in zip(used, self.limits, strict=True))

    @staticmethod
    def only_gained(old: Contents, host: Contents) -> bool:
        """Whether what was known is known still, with more to it."""
        pairs = [(was, host.get(p, Held())) for p, was in old.items()]
        return all(was.block in (0, now.block) and was.slot in (0, now.slot) for was, now in pairs)

    def below(self, path: Path, host: Contents) -> Iterator[Path]:
        """Those in host memory below the path that own something."""
        salt, tokens = path
        if len(tokens) % self.tree.block_size:
            return iter(())
        longer = (p for p in host if p[0] == salt and len(p[1]) > len(tokens) and p[1].startswith(tokens))
        return (p for p in longer if host[p].block or host[p].slot)
