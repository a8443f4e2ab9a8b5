"""guidellm's benchmark against a live server: every request succeeds and its tokens are counted.

Heavy: `pip install 'headway[serve,eval]'`, then `pytest -m clients`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headway.aio import AsyncLLM
from tests.server.live import live

GUIDELLM = shutil.which("guidellm") or str(Path(sys.executable).with_name("guidellm"))
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not Path(GUIDELLM).exists(), reason="guidellm is not installed"),
]


def test_a_benchmark_succeeds(tiny_model_dir: Path, tmp_path: Path) -> None:
    llm = AsyncLLM(tiny_model_dir, device="cpu", max_num_seqs=8, max_model_len=512, generation_config="none")
    with live(llm, served_model_name=["tiny"]) as server:
        command = [GUIDELLM, "run", "--disable-console"]
        command += ["--backend", f"kind=openai_http,target={server.url},model=tiny"]
        command += ["--tokenizer", f"kind=hf_auto,model={tiny_model_dir}"]
        command += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"]
        command += ["--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"]
        command += ["--output", f"kind=json,path={tmp_path / 'report.json'}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report: Any = json.loads((tmp_path / "report.json").read_text())
    totals = report["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["successful"] == 6
    assert totals["errored"] == 0
