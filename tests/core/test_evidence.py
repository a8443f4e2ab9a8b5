"""Runs that many processes share: nothing is lost or counted twice, and nothing old is taken for new."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.core import evidence


@pytest.fixture(autouse=True)
def known_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "commit_id", lambda sources: "a commit")


def test_shards_that_end_together_add_up_once(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    evidence.record("another", {"kept": 1}, path)

    def end(shard: int) -> object:
        return evidence.record_shard("run", shard, 8, {"traces": 10, "hits": shard}, path)

    with ThreadPoolExecutor(8) as pool:
        totals = [total for total in pool.map(end, range(8)) if total is not None]
    assert totals == [{"traces": 80, "hits": 28}]
    document = json.loads(path.read_text())
    assert document["another"]["kept"] == 1
    assert document["run"]["total"] == {"traces": 80, "hits": 28}
    assert end(3) == {"traces": 80, "hits": 28}  # run again: in place of the one before


@pytest.mark.parametrize("change", ["commit", "number of shards"])
def test_shards_of_another_run_do_not_count(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, num_shards = tmp_path / "evidence.json", 2
    assert evidence.record_shard("run", 0, num_shards, {"traces": 10}, path) is None
    if change == "commit":
        monkeypatch.setattr(evidence, "commit_id", lambda sources: "another commit")
    else:
        num_shards = 3
    assert evidence.record_shard("run", 1, num_shards, {"traces": 7}, path) is None
    assert json.loads(path.read_text())["run"]["total"] == {"traces": 7}
