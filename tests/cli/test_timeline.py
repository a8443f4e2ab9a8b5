"""`headway bench latency --timeline` and `--plot`: files that their readers take."""

from __future__ import annotations

import importlib.util
import json
import struct
import zlib
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from headway.cli.bench.plot import draw
from headway.cli.main import main
from headway.engine.perfetto import CPU_LANE, GPU_LANE, Recording, write_timeline
from tests.engine.paced import paced_timeline

SMALL = ("--device", "cpu", "--max-model-len", "128", "--batch-size", "2", "--input-len", "5")
LAST_US = 0.002  # times are rounded to nanoseconds


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    return [
        Recording("serial", paced_timeline(monkeypatch, 0, 100)),
        Recording("launch-ahead, depth 1", paced_timeline(monkeypatch, 1, 100)),
    ]


def lanes_of(events: list[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Spans by process and lane, in order."""
    lanes = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            lanes[event["pid"], event["tid"]].append(event)
    return {lane: sorted(spans, key=lambda span: span["ts"]) for lane, spans in lanes.items()}


def check_events(events: list[dict[str, Any]]) -> None:
    """What the trace-event format asks of each kind, and no two spans of a lane at once."""
    fields = {
        "M": {"args"},
        "X": {"ts", "dur", "tid"},
        "C": {"ts", "args"},
        "s": {"ts", "id"},
        "f": {"ts", "id"},
    }
    for event in events:
        assert {"name", "pid"} | fields[event["ph"]] <= event.keys(), event
        assert event.get("ts", 0) >= 0, event
        assert event.get("dur", 0) >= 0, event
    for spans in lanes_of(events).values():
        for span, following in pairwise(spans):
            assert span["ts"] + span["dur"] <= following["ts"] + LAST_US, (span, following)


def test_a_trace_has_both_lanes_and_both_recordings(recordings: list[Recording], tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    write_timeline(file, recordings, "a model, batch 8")
    trace = json.loads(file.read_text())
    events = trace["traceEvents"]
    check_events(events)
    lanes = lanes_of(events)
    for process in (1, 2):
        assert [span["args"]["step"] for span in lanes[process, GPU_LANE]] == list(range(100))
        names = [span["name"] for span in lanes[process, CPU_LANE][:6]]
        assert names[:2] == ["plan", "launch"]
        assert {"collect", "commit", "outputs"} <= {span["name"] for span in lanes[process, CPU_LANE]}
    assert trace["otherData"]["steady"]["serial"]["idle_share"] > 0.1


def test_arrows_lead_from_a_launch_to_its_step(recordings: list[Recording], tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    write_timeline(file, recordings, "")
    events = json.loads(file.read_text())["traceEvents"]
    starts, ends = ({e["id"]: e for e in events if e["ph"] == kind} for kind in ("s", "f"))
    assert len(starts) == 200
    assert starts.keys() == ends.keys()
    assert all(starts[name]["ts"] <= ends[name]["ts"] for name in starts)
    launches = {(e["pid"], e["ts"]) for e in events if e["name"] == "launch" and e["ph"] == "X"}
    assert {(e["pid"], e["ts"]) for e in starts.values()} <= launches


def test_counters_say_what_is_queued_and_what_is_idle(recordings: list[Recording], tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    write_timeline(file, recordings, "")
    events = json.loads(file.read_text())["traceEvents"]
    for process, deepest in ((1, 1), (2, 2)):
        counts = [e for e in events if e["ph"] == "C" and e["pid"] == process]
        depths = [e["args"]["steps"] for e in counts if e["name"] == "queue depth"]
        assert (min(depths), max(depths), depths[-1]) == (0, deepest, 0)
    serial_idle = [e["args"]["%"] for e in events if e["name"] == "GPU idle share" and e["pid"] == 1]
    assert serial_idle == [pytest.approx(100 * 34.5 / 234.5, abs=0.01)] * 99


def test_bench_writes_a_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.json"
    words = ["bench", *SMALL, "--output-len", "16", "--num-iters", "2", "--timeline", str(file)]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steady_decode"]["num_steps"] >= 10
    events = json.loads(file.read_text())["traceEvents"]
    check_events(events)
    collects = [e for e in events if e["name"] == "collect"]
    assert len(collects) == 2 * 16


def test_bench_draws_serial_beside_launch_ahead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.png"
    words = [
        "bench",
        *SMALL,
        "--output-len",
        "16",
        "--num-iters",
        "1",
        "--launch-depth",
        "1",
        "--plot",
        str(file),
    ]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["launch_depth"] == 1
    assert report["serial"]["steady_decode"]["num_steps"] >= 10
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_plot_shows_the_steps(recordings: list[Recording], tmp_path: Path) -> None:
    """Its size, and that it is no blank page."""
    file = tmp_path / "p.png"
    draw(file, recordings, "a model, batch 8")
    data = file.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1950, 810)
    begin = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[begin - 4 : begin])
    assert len(set(zlib.decompressobj().decompress(data[begin + 4 : begin + 4 + length]))) > 50


@pytest.mark.parametrize("flag", ["--timeline", "--plot"])
def test_too_few_steps_are_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL, "--output-len", "4", flag, str(tmp_path / "x")]) == 2
    assert "--output-len must be at least 16" in capsys.readouterr().err


def test_a_plot_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", *SMALL, "--plot", str(tmp_path / "x.png")]) == 2
    assert "headway[bench]" in capsys.readouterr().err
