"""docs/serving.md is what the code says, its codes are those the server uses, and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from headway.config import EngineConfig
from headway.fields import flag, specs
from headway.server.errors import ERROR_TABLE
from headway.server.tables import TABLES, renew
from tests.pages import python_blocks
from tests.server.live import Live

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()
SOURCES = "\n".join(path.read_text() for path in (ROOT / "python" / "headway" / "server").rglob("*.py"))


def test_the_tables_are_the_codes() -> None:
    assert renew(PAGE) == PAGE, "run: python -m headway.server.tables docs/serving.md"
    assert set(re.findall(r"<!-- table: ([\w ]+) -->", PAGE)) == set(TABLES)
    assert renew(PAGE.replace("/v1/models", "/v1/modells")) == PAGE


def test_every_code_is_named_and_every_name_is_a_code() -> None:
    used = set(re.findall(r'code="(\w+)"', SOURCES)) | {row.code for row in ERROR_TABLE.values() if row.code}
    used |= set(re.findall(r'unavailable\([^)]*?"(\w+)", ', SOURCES))
    assert used <= set(re.findall(r"`(\w+)`", PAGE)), used
    (others,) = re.findall(r"Other codes: (.*?)\. 429", PAGE, re.DOTALL)
    for code in re.findall(r"`(\w+)`", others):
        assert f'"{code}"' in SOURCES, code


def test_every_flag_of_the_text_is_there() -> None:
    flags = set(re.findall(r"^\| `(--[\w-]+)` ", PAGE, re.MULTILINE))
    flags |= {flag(name) for name in specs(EngineConfig)}  # flags of the same command
    assert set(re.findall(r"`(--[\w-]+)", PAGE)) - {"--port"} <= flags


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_its_python_runs(model_server: Live, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = python_blocks("docs/serving.md")
    exec(source.replace("http://127.0.0.1:8000", model_server.url), {})
    assert capsys.readouterr().out.strip()
