"""Records that are filled at once are those that dataclass makes field by field."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from headway.errors import RequestError
from headway.fields import refuse_values, setting, with_quick_init


@dataclasses.dataclass(frozen=True)
class Slow:
    count: int = setting(1, kind="int", low=0, help="of things")
    names: tuple[str, ...] = setting((), kind="list", help="of them")

    def __post_init__(self) -> None:
        refuse_values(self, RequestError)


@with_quick_init
class Quick(Slow):
    """Of the same fields."""


@pytest.mark.parametrize("given", [{}, {"count": 3}, {"names": ("a",), "count": 0}])
def test_a_quick_init_makes_what_the_slow_one_makes(given: dict[str, Any]) -> None:
    quick, slow = Quick(**given), Slow(**given)
    assert vars(quick) == vars(slow)
    assert quick == Quick(*vars(slow).values()), "by position"
    assert hash(quick) == hash(Quick(**given))
    assert vars(dataclasses.replace(quick, count=9)) == vars(dataclasses.replace(slow, count=9))
    assert inspect.signature(Quick) == inspect.signature(Slow)


def test_a_quick_init_refuses_what_the_slow_one_refuses() -> None:
    with pytest.raises(RequestError, match="count"):
        Quick(count=-1)
    with pytest.raises(TypeError, match="cuont"):
        Quick(cuont=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="count"):
        Quick(1, count=1)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Quick().count = 2  # type: ignore[misc]
