"""The C++ checks of the core, one test each."""

from __future__ import annotations

import pytest

from headway import _core


@pytest.mark.parametrize("name", _core.check_names())
def test_check(name: str) -> None:
    results = {found: (passed, message) for found, passed, message in _core.run_checks(name)}
    passed, message = results[name]
    assert passed, message


def test_the_list_is_not_empty() -> None:
    assert len(_core.check_names()) > 40
    assert _core.run_checks("no check has this name") == []
