"""The mini-soak: memory, files and threads do not grow with the number of requests; a planted leak is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.server.scorecard import ROOT, record
from tests.server.soak import Report

LIMIT_BYTES = 16.0  # a request, over the full count; a short run has a coarser measure
LEAK_BYTES = 64
WARM_UP = 0.3  # of the samples: caches and pools fill


def run_soak(num_requests: int, leak_bytes: int, *kind: str) -> Report:
    command = [sys.executable, "-m", "tests.server.soak", str(num_requests), str(leak_bytes), *kind]
    # An editable install puts the package on the path of any interpreter; a source tree does not.
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Report(**json.loads(done.stdout))


def bytes_a_request(report: Report) -> float:
    """The slope of a straight line through the samples after warm-up."""
    count, held = np.array(report.samples[int(WARM_UP * len(report.samples)) :], float).T
    return float(np.polyfit(count, held, 1)[0])


def check(report: Report, limit_bytes: float) -> None:
    assert report.num_right > 0.4 * report.num_requests
    assert report.num_given_up > 0.2 * report.num_requests
    assert report.num_refused > 0.1 * report.num_requests
    for counts in (report.threads, report.open_files):  # some may be closing in any one reading
        third = len(counts) // 3
        assert min(counts[-third:]) <= min(counts[:third]) + 1
    slope = bytes_a_request(report)
    assert slope <= limit_bytes, f"{slope:.1f} bytes more with each request"


def test_memory_stays_and_a_leak_is_found() -> None:
    """Short: what is planted is as much larger as the run is shorter."""
    num_requests, leak_bytes, limit_bytes = 2000, 20_000, 2000.0
    check(run_soak(num_requests, 0), limit_bytes)
    with pytest.raises(AssertionError, match="bytes more with each request"):
        check(run_soak(num_requests, leak_bytes), limit_bytes)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "num_requests", "limit_bytes"),
    [((), 200_000, LIMIT_BYTES), (("http",), 20_000, 6 * LIMIT_BYTES)],
)
def test_two_hundred_thousand_requests(kind: tuple[str, ...], num_requests: int, limit_bytes: float) -> None:
    """Over sockets a tenth as many, and a limit that as few samples can tell from noise."""
    report = run_soak(num_requests, 0, *kind)
    leak_bytes = LEAK_BYTES if not kind else 8 * LEAK_BYTES
    leaking = run_soak(num_requests, leak_bytes, *kind)
    record(
        "L1 mini-soak" + (", over HTTP" if kind else ""),
        num_requests=num_requests,
        num_given_up=report.num_given_up,
        num_refused=report.num_refused,
        bytes_a_request=round(bytes_a_request(report), 2),
        planted_leak_bytes=leak_bytes,
        bytes_a_request_with_leak=round(bytes_a_request(leaking), 2),
        elapsed_s=round(report.elapsed_s, 1),
    )
    check(report, limit_bytes)
    with pytest.raises(AssertionError, match="bytes more with each request"):
        check(leaking, limit_bytes)
