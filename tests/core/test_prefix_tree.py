"""The prefix tree in C++ against a trie in plain Python, and under sanitizers."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.core import evidence, native
from tests.core.native import FAST, QUICK, SANITIZED, TREE, Program
from tests.core.prefix_judge import Judge

NUM_SHARDS = 10  # of the long run, for as many processes
OPERATIONS = {
    "hold",
    "add",
    "drop",
    "match",
    "hits",
    "snap",
    "read",
    "leaf",
    "take",
    "evict",
    "thin",
    "hide",
    "reset",
    "seek",
    "found in host memory",
    "save",
    "load",
    "finish",
    "blocks out",
    "blocks back",
    "states out",
    "states back",
    "forgotten by host memory",
}


@dataclass(frozen=True)
class Wrong:
    breaks: str
    file: str
    original: str
    replacement: str


# Most leave the tree sound, so that only who knows what should be found sees them.
WRONG = [
    Wrong("another_parents_child", "core/prefix_tree.cpp", "if (found.parent != wanted.parent ||", "if ("),
    Wrong(
        "found_short_of_the_longest",
        "core/host_tier.cpp",
        "if (end > match.start && (",
        "if (request.host_node == 0 && end > match.start && (",
    ),
    Wrong(
        "found_with_a_hole",
        "core/host_tier.cpp",
        "if (has_blocks_ && end > match.num_tokens && host_.node(node).block == kDummyBlock) return request.host_node;",
        "",
    ),
    Wrong(
        "source_free_while_it_is_copied",
        "core/host_tier.cpp",
        "  move.transfer.blocks.push_back({block, host_block});",
        "  move.transfer.blocks.push_back({block, host_block});\n  blocks_.share(block);\n"
        "  blocks_.release(block, 0);\n  blocks_.release(block, 0);",
    ),
    Wrong(
        "blocks_come_back_in_disorder",
        "core/host_tier.cpp",
        "  std::ranges::reverse(move.transfer.blocks);",
        "  std::ranges::sort(move.transfer.blocks, {}, &RecordMove::source);",
    ),
    Wrong(
        "a_log_is_forgotten",
        "core/host_tier.cpp",
        "move.has_log = host_.snapshot(host_node).has_log;",
        "move.has_log = false;",
    ),
    Wrong(
        "leaves_are_dropped",
        "core/host_tier.cpp",
        "  if (host_path_.size() == path_.size() && is_worth_saving(node)) return true;",
        "  if (host_path_.size() == path_.size() && path_.size() % 2 == 0 && is_worth_saving(node)) return true;",
    ),
]
NUM_WRONG_IN_EVERY_RUN = 3


def judge(program: Path, num_ops: int, seed: int) -> Judge:
    found = Judge()
    command = [str(program), "--ops", str(num_ops), "--seed", str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        last = ""
        for last in running.stdout:
            assert not last.startswith("FAILED"), last
            found.line(last)
    assert running.returncode == 0
    assert last == "end\n"
    missing = {name for name in OPERATIONS if found.seen[name] < num_ops / 10_000}
    assert not missing, found.seen
    return found


def test_the_tree_is_a_trie(tmp_path: Path) -> None:
    judge(Program(TREE, FAST).build(tmp_path / "tree"), 60_000, seed=1)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(wrong, id=wrong.breaks, marks=[pytest.mark.long] if i >= NUM_WRONG_IN_EVERY_RUN else [])
        for i, wrong in enumerate(WRONG)
    ],
)
def test_a_wrong_tree_is_seen(tmp_path: Path, wrong: Wrong) -> None:
    source = (native.CSRC / wrong.file).read_text()
    assert source.count(wrong.original) == 1
    overlay = {wrong.file: source.replace(wrong.original, wrong.replacement)}
    program = Program(TREE, QUICK).build(tmp_path / "tree", overlay)
    with pytest.raises(AssertionError):
        judge(program, 60_000, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("shard", range(NUM_SHARDS))
def test_the_tree_is_a_trie_over_ten_million_operations(tmp_path: Path, shard: int) -> None:
    plain = Program(TREE, FAST).build(tmp_path / "tree")
    sanitized = Program(TREE, SANITIZED).build(tmp_path / "sanitized")
    judged = judge(plain, 200_000, seed=100 + shard).seen
    for program, num_ops in ((plain, 600_000), (sanitized, 200_000)):
        done = native.run(program, "--ops", num_ops, "--seed", 200 + shard, "--quiet", 1, timeout_s=3000)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    counts = {"num_ops": 1_000_000} | {f"judged by a trie: {what}": count for what, count in judged.items()}
    total = evidence.record_shard("prefix tree", shard, NUM_SHARDS, counts)
    assert total is None or total["num_ops"] == 10_000_000
