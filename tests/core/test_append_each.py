"""One token to each of many lists: as `append` in a loop, whatever the lists hold and wherever they are."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from headway._core import append_each


@pytest.mark.parametrize("num_lists", [0, 1, 2, 17, 256, 1000])
def test_every_list_gains_its_token(num_lists: int) -> None:
    rng = np.random.default_rng(num_lists)
    lists = [list(range(rng.integers(0, 9))) for _ in range(num_lists)]
    expected = [list(each) for each in lists]
    for _ in range(40):
        tokens = rng.integers(-(2**31), 2**31, num_lists).astype(np.int32)
        append_each(lists, tokens)
        for each, token in zip(expected, tokens.tolist(), strict=True):
            each.append(token)
    assert lists == expected
    assert all(type(token) is int for each in lists for token in each)


def test_a_list_may_be_there_twice() -> None:
    shared: list[int] = []
    append_each([shared, shared, []], np.array([1, 2, 3], np.int32))
    assert shared == [1, 2]


@pytest.mark.parametrize(
    ("lists", "tokens", "error"),
    [
        ([[1], [2]], np.zeros(1, np.int32), ValueError),
        ([[1]], np.zeros(2, np.int32), ValueError),
        ([[1]], np.zeros((1, 1), np.int32), ValueError),
        ([[1], (2,)], np.zeros(2, np.int32), TypeError),
        ([[1], None], np.zeros(2, np.int32), TypeError),
        (([1],), np.zeros(1, np.int32), TypeError),
    ],
)
def test_what_does_not_fit_changes_nothing(lists: object, tokens: np.ndarray, error: type[Exception]) -> None:
    with pytest.raises(error):
        append_each(lists, tokens)
    assert lists[0] == [1]


def test_a_token_is_held_by_its_list_alone() -> None:
    lists: list[list[int]] = [[]]
    append_each(lists, np.array([123_456], np.int32))
    appended = [int("123456")]  # no constant of this file
    assert sys.getrefcount(lists[0][0]) == sys.getrefcount(appended[0])
