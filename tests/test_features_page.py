"""docs/features.md is what the code says. Its Python runs in tests/test_pages.py."""

from __future__ import annotations

from headway.sampling.page import renew
from tests.pages import ROOT

PAGE = (ROOT / "docs" / "features.md").read_text()


def test_the_table_of_fields_is_the_code() -> None:
    assert renew(PAGE) == PAGE, "run: python -m headway.sampling.page docs/features.md"
