"""The Pareto front against its definition, and the cases in which a sweep goes wrong: ties, duplicates, signs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq.errors import UsageError
from llmq.results.pareto import pareto_front

SMALL = st.integers(-3, 3).map(float)  # few values, so that ties and duplicates are common


def by_definition(points: list[tuple[float, float]], minimize: tuple[bool, bool]) -> list[bool]:
    def better(a: float, b: float, less: bool) -> bool:
        return a < b if less else a > b

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        sides = list(zip(a, b, minimize, strict=True))
        return not any(better(y, x, less) for x, y, less in sides) and any(better(x, y, less) for x, y, less in sides)

    return [not any(beats(other, point) for other in points) for point in points]


@given(st.lists(st.tuples(SMALL, SMALL), max_size=12), st.tuples(st.booleans(), st.booleans()))
def test_it_is_what_no_other_point_beats(points: list[tuple[float, float]], minimize: tuple[bool, bool]) -> None:
    assert pareto_front(points, minimize=minimize) == by_definition(points, minimize)


def test_ties_and_duplicates() -> None:
    assert pareto_front([]) == []
    assert pareto_front([(1, 1), (1, 1)]) == [True, True]
    assert pareto_front([(1, 2), (1, 1), (2, 1)]) == [False, True, False]
    assert pareto_front([(2, 2), (2, 2), (1, 1)]) == [False, False, True]
    assert pareto_front([(-0.0, 1), (0.0, 1)]) == [True, True]


def test_more_can_be_better() -> None:
    kl_and_speed = [(0.1, 50.0), (0.2, 40.0), (0.3, 60.0)]
    assert pareto_front(kl_and_speed, minimize=(True, False)) == [True, False, True]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_was_not_measured_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="needs finite figures"):
        pareto_front([(1.0, 1.0), (value, 0.0)])
