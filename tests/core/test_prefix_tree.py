"""The prefix tree in C++ against a trie in plain Python, and under sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.core import evidence, native
from tests.core.native import FAST, SANITIZED, TREE, Program
from tests.core.prefix_model import Judge

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
}


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


def test_a_wrong_tree_is_seen(tmp_path: Path) -> None:
    """Another parent's children count as a node's own."""
    source = (native.CSRC / "core" / "prefix_tree.cpp").read_text()
    wrong = source.replace("if (found.parent != wanted.parent ||", "if (")
    assert wrong != source
    program = Program(TREE, FAST).build(tmp_path / "tree", {"core/prefix_tree.cpp": wrong})
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
