"""A prefix tree in plain Python: sets of paths. Judges, line by line, what `csrc/tests/tree` says the C++ tree did.

Where the tree is free to choose (which snapshot goes first when it weighs cost) the model knows bounds; all else it
knows exactly: what a match finds, what is added, which leaf is the oldest, and that nothing held ever goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

Path = tuple[str, str]  # salt, tokens


@dataclass
class Node:
    pins: int = 0
    last_use: int = 0
    has_snapshot: bool = False


class PrefixModel:
    """One tree; `hidden` are nodes that rows still hold but nobody can find, by the pins left."""

    def __init__(self, block_size: int, has_blocks: bool, has_states: bool) -> None:
        self.block_size, self.has_blocks, self.has_states = block_size, has_blocks, has_states
        self.nodes: dict[Path, Node] = {}
        self.clock = 0

    def parents(self, path: Path) -> list[Path]:
        """The path and all above it, the deepest first."""
        salt, tokens = path
        full = len(tokens) - len(tokens) % self.block_size
        above = [(salt, tokens[:end]) for end in range(full, 0, -self.block_size)]
        return above if full == len(tokens) else [path, *above]

    def children(self, path: Path) -> list[Path]:
        salt, tokens = path
        if len(tokens) % self.block_size:
            return []  # a leaf that ends within a block
        most = len(tokens) + self.block_size
        return [
            p
            for p in self.nodes
            if p[0] == salt and len(tokens) < len(p[1]) <= most and p[1].startswith(tokens)
        ]

    def touch(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self.clock += 1
            self.nodes[path].last_use = self.clock

    def unpin(self, path: Path) -> None:
        self.touch(self.parents(path))
        for above in self.parents(path):
            self.nodes[above].pins -= 1

    def match(self, salt: str, tokens: str, num_kv: int, start: int) -> None:
        kv = 0
        while kv + self.block_size <= len(tokens) and (salt, tokens[: kv + self.block_size]) in self.nodes:
            kv += self.block_size
        assert num_kv == kv, "the tree finds other blocks than there are"
        if not self.has_states:
            assert start == kv
            return
        known = range(min(len(tokens), kv + self.block_size - 1), 0, -1)
        usable = [
            end for end in known if end % self.block_size == 0 or self.is_free_leaf((salt, tokens[:end]))
        ]
        starts = (end for end in usable if end <= len(tokens) and self.has_snapshot((salt, tokens[:end])))
        assert start == next(starts, 0), "computing begins elsewhere than at the deepest snapshot"

    def is_free_leaf(self, path: Path) -> bool:
        return path in self.nodes and (not self.has_blocks or self.nodes[path].pins == 0)

    def has_snapshot(self, path: Path) -> bool:
        return path in self.nodes and self.nodes[path].has_snapshot

    def remove(self, path: Path) -> None:
        assert self.nodes[path].pins == 0, "a node that somebody holds was removed"
        assert not self.children(path), "a node was removed whose children stay"
        del self.nodes[path]

    def evict(self, path: Path | None) -> None:
        free = {p: node.last_use for p, node in self.nodes.items() if node.pins == 0}
        if path is None:
            assert not free, "nothing was evicted though something could be"
            return
        assert path == min(free, key=lambda p: free[p]), "another leaf was used longer ago"
        self.remove(path)


class Judge:
    """Follows a log. Trees in which a node was hidden or a reset hid pinned ones are left alone from there on."""

    def __init__(self) -> None:
        self.tree = PrefixModel(1, False, False)
        self.is_judging = False
        self.seen: Counter[str] = Counter()

    def line(self, text: str) -> None:
        what, *words = text.split()
        if what == "new":
            size, has_blocks, has_states = map(int, words)
            self.tree, self.is_judging = PrefixModel(size, bool(has_blocks), bool(has_states)), True
        elif self.is_judging:
            self.seen[what] += 1
            getattr(self, what)(*("" if word == "." else word for word in words))

    def node(self, salt: str, tokens: str) -> Node:
        assert (salt, tokens) in self.tree.nodes, "a node was found that is not there"
        return self.tree.nodes[salt, tokens]

    def hold(self, salt: str, tokens: str) -> None:
        self.node(salt, tokens).pins += 1

    def add(self, salt: str, tokens: str) -> None:
        assert (salt, tokens) not in self.tree.nodes, "a node is there and was not found"
        self.tree.nodes[salt, tokens] = Node(pins=1)

    def drop(self, salt: str, tokens: str) -> None:
        self.node(salt, tokens)
        self.tree.unpin((salt, tokens))

    def match(self, salt: str, tokens: str, num_kv: str, start: str) -> None:
        self.seen["hits"] += int(start) > 0
        self.tree.match(salt, tokens, int(num_kv), int(start))

    def snap(self, salt: str, tokens: str, is_done: str) -> None:
        node = self.node(salt, tokens)
        assert node.has_snapshot or is_done == "1"
        node.has_snapshot = True

    def read(self, salt: str, tokens: str) -> None:
        assert self.tree.has_snapshot((salt, tokens))

    def leaf(self, salt: str, tokens: str) -> None:
        assert (salt, tokens) not in self.tree.nodes
        self.tree.nodes[salt, tokens] = Node(pins=1, has_snapshot=True)

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

    def end(self) -> None:
        """The log is whole."""
