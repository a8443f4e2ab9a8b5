"""docs/reliability.md: every row that the long runs wrote is on the page, and every test that it names is there."""

from __future__ import annotations

import json
import re

from tests.pages import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text()
RESULTS = json.loads((ROOT / "bench" / "results" / "reliability.json").read_text())


def numbers(text: str) -> set[str]:
    return {number.replace(",", "") for number in re.findall(r"\d[\d,]*", text)}


def test_every_row_is_on_the_page() -> None:
    ids = set(re.findall(r"^\| (\w+) \|", PAGE, re.MULTILINE))
    assert {name.split()[0] for name in RESULTS} <= ids


COUNTS = (
    "num_requests",
    "num_given_up",
    "num_aborts",
    "num_disconnects",
    "num_answered",
    "num_refused",
    "num_finished",
    "num_files",
    "num_examples",
    "num_engines",
)


def test_counts_on_the_page_are_those_of_the_results() -> None:
    shown = numbers(PAGE)
    for name, figures in RESULTS.items():
        for count in COUNTS:
            assert str(figures.get(count, 500)) in shown, (name, count)


def test_every_test_on_the_page_is_there() -> None:
    for name in re.findall(r"`(test_\w+\.py)`", PAGE):
        assert list((ROOT / "tests").rglob(name)), name
    for path in re.findall(r"`(tests/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
