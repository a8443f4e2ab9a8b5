"""The prefix tree in C++ against a trie in plain Python, and under sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.core import evidence, native
from tests.core.native import FAST, SANITIZED, TREE, Program
from tests.core.prefix_model import Judge

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
def test_the_tree_is_a_trie_at_length(tmp_path: Path) -> None:
    plain = Program(TREE, FAST).build(tmp_path / "tree")
    seen = judge(plain, 2_000_000, seed=2).seen
    assert native.run(plain, "--ops", 6_000_000, "--seed", 3, "--quiet", 1, timeout_s=3000).returncode == 0
    sanitized = Program(TREE, SANITIZED).build(tmp_path / "sanitized")
    done = native.run(sanitized, "--ops", 2_000_000, "--seed", 4, "--quiet", 1, timeout_s=3000)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    evidence.record("prefix tree", {"num_ops": 10_000_000, "judged_by_a_trie": dict(seen)})
