"""docs/troubleshooting.md: every text on it is one that the code says, word for word."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.pages import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
ROWS = [line.split(" | ")[0].removeprefix("| ") for line in PAGE.splitlines() if line.startswith("| ")]
TEXTS = [
    text
    for row in ROWS
    if row != "text"
    for text in re.findall(r"`([^`]+)`", row)
    if not text.startswith("headway_")
]


@cache
def literals() -> tuple[str, ...]:
    """Every string of the Python sources, joined as the language joins them; what is filled in is `...`."""
    found = []
    for path in sorted((ROOT / "python" / "headway").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[\w.]*[sdr]", "...", node.value))
    return tuple(found)


@cache
def native_text() -> str:
    """Sources of the core and of the build, a line's continuation joined to it."""
    files = [*(ROOT / "csrc" / "core").iterdir(), *(ROOT / "cmake").iterdir(), ROOT / "CMakeLists.txt"]
    return re.sub(r"\\\n\s*", "", "\n".join(file.read_text() for file in files))


def is_said(text: str) -> bool:
    parts = [re.escape(part) for part in text.split("...")]
    pattern = re.compile(r".*?".join(parts))
    if any(pattern.search(literal) for literal in literals()):
        return True
    return bool(re.search(r'[^"\n]*?'.join(parts), native_text()))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_the_page_is_one_of_the_code(text: str) -> None:
    assert is_said(text)


def test_a_text_that_nobody_says_would_be_seen() -> None:
    assert len(TEXTS) > 50
    assert not is_said("the weights ... are not to my taste")
    assert not is_said("is not ... a folder of this kind")


def test_what_the_build_refuses_is_on_the_page() -> None:
    refusals = re.findall(r'set\(HEADWAY_ERROR "([^"]*)"', native_text())
    assert len(refusals) >= 6
    missing = [text for text in refusals if not any(_fits(known, text) for known in TEXTS)]
    assert len(missing) <= 2, missing  # versions that are too old name themselves and their remedy


def _fits(known: str, text: str) -> bool:
    return bool(re.search(".*?".join(re.escape(part) for part in known.split("...")), text))
