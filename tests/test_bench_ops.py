"""The benchmarks' table: which entries run, and what becomes of a peer that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import ops_goals
from bench.ops.__main__ import HEADLINES
from bench.ops.bench_mamba import BATCHES, PREFILL, SHAPES
from bench.ops.peer_mamba import recorded_us
from bench.ops.report import Report


def test_names_are_wanted_up_to_a_slash():
    report = Report(1000.0, ("decode/nano30b/b1", "ssd"))
    assert report.wants("decode/nano30b/b1/8192")
    assert report.wants("ssd/nano9b/1x512")
    assert not report.wants("decode/nano30b/b16/8192")
    assert Report(1000.0).wants("anything")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_without_arguments_times_every_figure_of_a_shape(shape: str):
    report = Report(1000.0, HEADLINES)
    prompts = [f"{kernel}/{shape}/{load}" for kernel in ("ssd", "conv") for load in PREFILL]
    steps = [
        f"{kernel}/{shape}/b{batch}" for kernel in ("decode_chain", "decode_window") for batch in BATCHES
    ]
    names = [*prompts, f"chain/{shape}/8x2048", *steps, f"decode_window_4_tokens/{shape}/b64/fp32"]
    assert [name for name in names if not report.wants(name)] == []


def test_a_peer_that_fails_leaves_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def fail() -> float:
        raise RuntimeError("no kernel image\nand more")

    out = tmp_path / "out.json"
    report = Report(1000.0, out=out, commit="abc1234")
    report.add("scan", 10.0, 5000.0, 2e6, {"broken": fail, "slow": lambda: 25.0})
    written = json.loads(out.read_text())
    assert written["commit"] == "abc1234"
    entry = written["scan"]
    assert entry["over_floor"] == 2.0
    assert entry["gb_per_s"] == 0.5
    assert entry["tflop_per_s"] == 0.2
    assert entry["peers"] == {
        "broken": {"reason": "RuntimeError: no kernel image"},
        "slow": {"us": 25.0, "times_slower": 2.5},
    }
    assert "broken RuntimeError: no kernel image; slow 25.00 (2.50)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("only", "num_entries"),
    [(["layer/small/b1/rotary", "layer/nano30b/b1/rotary"], 1), (["layer/nothing"], 0)],
)
def test_one_command_times_and_writes(tmp_path: Path, only: list[str], num_entries: int):
    """On whatever device there is: with a GPU the shapes are other ones."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "bench.ops", "--only", *only, "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == (0 if num_entries else 1), ran.stderr
    assert (
        len(json.loads(out.read_text()).keys() - {"commit", "device", "torch", "copy_gb_per_s"})
        == num_entries
    )


def test_recorded_times_stand_in_for_a_peer_that_is_not_installed():
    """Of the same kind of GPU only; a decode chain's time is its kernels' sum."""
    parts = ("conv_step/nano9b/b8", "ssm_step/nano9b/b8/fp32", "gated_norm/nano9b/b8")
    times = [recorded_us(name, "NVIDIA H200") for name in parts]
    assert all(times)
    assert recorded_us("decode_window/nano9b/b8/fp32", "NVIDIA H200") == sum(time for time in times if time)
    assert recorded_us("ssd/nano30b/8x2048", "NVIDIA H200")
    assert recorded_us("chain/nano30b/8x2048", "NVIDIA H200") is None
    assert recorded_us("ssd/nano30b/8x2048", "another GPU") is None


def test_goals_missed_are_bold_and_recorded_peers_are_named():
    slower = {"us": 90.0, "times_slower": 3.0}
    run = {
        "copy_gb_per_s": 4000,
        "ssd/nano9b/1x512": {"over_floor": 2.0, "peers": {"vllm": slower}},
        "ssd/nano9b/1x4096": {
            "over_floor": 2.6,
            "peers": {"vllm, another sitting": slower | {"times_slower": 2.9}},
        },
        "ssd/nano9b/8x2048": {"over_floor": 2.5, "peers": {"vllm": {"reason": "no kernel image"}}},
    }
    scan, over_bytes, *_, greedy = (figure.row(run) for figure in ops_goals.FIGURES)
    assert scan.endswith("| 3 | nano9b 3 / **2.9** (recorded) /  /  |")
    assert over_bytes.endswith("| 2.5 | nano9b **2.6** / 2.5 /  |")
    assert greedy.endswith("| 1.15 |  |")


def test_every_goal_is_of_an_entry_that_a_run_without_arguments_times():
    report = Report(1000.0, HEADLINES)
    entries = {
        figure.entry.format(model=model, load=load)
        for figure in ops_goals.FIGURES
        for model in figure.models
        for load in figure.loads
    }
    assert [entry for entry in sorted(entries) if not report.wants(entry)] == []
