"""Judges, line by line, what `csrc/tests/tree` says the C++ prefix tree and its host tier did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tests.core.host_tier_model import Contents, HostTierModel, Moves, contents
from tests.core.prefix_model import Node, PrefixModel


def moves(words: Iterable[str]) -> Moves:
    pairs = (word.split(">") for word in words)
    return [(int(source), int(target)) for source, target in pairs]


def columns(words: Iterable[str]) -> tuple[Contents, Contents, Contents]:
    """The device's nodes before and after, and the host's."""
    _, before, after, host = (contents(part.split()) for part in " ".join(words).split("|"))
    return before, after, host


class Judge:
    """Follows a log. Trees in which a node was hidden or a reset hid pinned ones are left alone from there on."""

    def __init__(self) -> None:
        self.tree = PrefixModel(1, False, False)
        self.tier = HostTierModel(self.tree, 0, 0, 0, copies_late=False)
        self.is_judging = False
        self.num_trees = 0
        self.seen: Counter[str] = Counter()

    def line(self, text: str) -> None:
        what, *words = text.split()
        if what == "new":
            self.new(*map(int, words))
        elif self.is_judging:
            self.seen[what] += 1
            getattr(self, what)(*("" if word == "." else word for word in words))

    def new(self, size: int, has_blocks: int, has_states: int, *host: int) -> None:
        self.tree, self.is_judging = PrefixModel(size, bool(has_blocks), bool(has_states)), True
        self.num_trees += 1
        self.tier = HostTierModel(self.tree, *host, copies_late=self.num_trees % 2 == 0)

    def node(self, salt: str, tokens: str) -> Node:
        assert (salt, tokens) in self.tree.nodes, "a node was found that is not there"
        return self.tree.nodes[salt, tokens]

    def hold(self, salt: str, tokens: str) -> None:
        self.node(salt, tokens).pins += 1

    def add(self, salt: str, tokens: str, block: str) -> None:
        assert (salt, tokens) not in self.tree.nodes, "a node is there and was not found"
        self.tree.nodes[salt, tokens] = Node(pins=1)
        self.tier.device_memory.blocks[int(block)] = (salt, tokens)

    def drop(self, salt: str, tokens: str) -> None:
        self.node(salt, tokens)
        self.tree.unpin((salt, tokens))

    def match(self, salt: str, tokens: str, num_kv: str, start: str) -> None:
        self.seen["hits"] += int(start) > 0
        self.tree.match(salt, tokens, int(num_kv), int(start))

    def snap(self, salt: str, tokens: str, slot: str) -> None:
        node = self.node(salt, tokens)
        assert node.has_snapshot != (slot != "0")
        node.has_snapshot = True
        self.tier.device_memory.slots[int(slot)] = ((salt, tokens), False)

    def read(self, salt: str, tokens: str) -> None:
        assert self.tree.has_snapshot((salt, tokens))

    def leaf(self, salt: str, tokens: str, block: str, slot: str) -> None:
        assert (salt, tokens) not in self.tree.nodes
        self.tree.nodes[salt, tokens] = Node(pins=1, has_snapshot=True)
        self.tier.device_memory.blocks[int(block)] = (salt, tokens)
        self.tier.device_memory.slots[int(slot)] = ((salt, tokens), True)

    def take(self, salt: str, tokens: str) -> None:
        assert self.tree.has_snapshot((salt, tokens))
        self.tree.remove((salt, tokens))

    def evict(self, salt: str, tokens: str = "") -> None:
        self.tree.evict(None if salt == "-" else (salt, tokens))

    def thin(self, salt: str, tokens: str = "") -> None:
        if salt == "-":
            assert not any(node.has_snapshot for node in self.tree.nodes.values())
            return
        assert self.tree.has_snapshot((salt, tokens))
        self.tree.nodes[salt, tokens].has_snapshot = False

    def hide(self, salt: str, tokens: str) -> None:
        self.is_judging = False

    def reset(self) -> None:
        self.is_judging = not any(node.pins for node in self.tree.nodes.values())
        self.tree.nodes.clear()
        self.tier.reset()

    def move(self, direction: str, *words: str) -> None:
        blocks, slots = (" ".join(words).split("/")[i].split() for i in range(2))
        self.seen["blocks out" if direction == "out" else "blocks back"] += len(blocks)
        self.seen["states out" if direction == "out" else "states back"] += len(slots)
        self.tier.move(direction, moves(blocks), moves(slots))

    def seek(self, salt: str, tokens: str, end: str) -> None:
        self.seen["found in host memory"] += end != "0"
        self.tier.seek((salt, tokens), int(end))

    def save(self, *words: str) -> None:
        known = self.tier.host
        self.tier.save(*columns(words))
        self.seen["forgotten by host memory"] += sum(
            held.block + held.slot > 0 and path not in self.tier.host for path, held in known.items()
        )

    def load(self, salt: str, tokens: str, *words: str) -> None:
        self.tier.load((salt, tokens), *columns(words))

    def finish(self, direction: str, *words: str) -> None:
        self.tier.finish(direction, *columns(words))

    def end(self) -> None:
        """The log is whole."""
