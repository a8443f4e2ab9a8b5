"""docs/features.md is what the code says, and its Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from headway.sampling.page import renew

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "features.md").read_text()
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_table_of_fields_is_the_code() -> None:
    assert renew(PAGE) == PAGE, "run: python -m headway.sampling.page docs/features.md"


def test_there_is_python_to_run() -> None:
    assert PYTHON_BLOCKS


@pytest.mark.parametrize("source", PYTHON_BLOCKS)
def test_the_python_runs_as_it_stands(source: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
