"""A prefix tree in plain Python: sets of paths.

Where the tree is free to choose (which snapshot goes first when it weighs cost) the model knows bounds; all else it
knows exactly: what a match finds, what is added, which leaf is the oldest, and that nothing held ever goes.
"""

from __future__ import annotations

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

    def find(self, salt: str, tokens: str) -> tuple[int, int]:
        """Tokens whose KV is there, and where computing could begin."""
        kv = 0
        while kv + self.block_size <= len(tokens) and (salt, tokens[: kv + self.block_size]) in self.nodes:
            kv += self.block_size
        if not self.has_states:
            return kv, kv
        known = range(min(len(tokens), kv + self.block_size - 1), 0, -1)
        usable = [
            end for end in known if end % self.block_size == 0 or self.is_free_leaf((salt, tokens[:end]))
        ]
        starts = (end for end in usable if end <= len(tokens) and self.has_snapshot((salt, tokens[:end])))
        return kv, next(starts, 0)

    def match(self, salt: str, tokens: str, num_kv: int, start: int) -> None:
        kv, deepest = self.find(salt, tokens)
        assert num_kv == kv, "the tree finds other blocks than there are"
        assert start == deepest, "computing begins elsewhere than at the deepest snapshot"

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
