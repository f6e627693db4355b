"""The Pareto front: which of several choices no other one beats in both of two figures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import inf, isfinite

from llmq.errors import UsageError


def pareto_front(points: Sequence[tuple[float, float]], *, minimize: tuple[bool, bool] = (True, True)) -> list[bool]:
    """Say of each point whether it is on the front.

    A point is off the front when another one is at least as good in both figures and better in one. Points that are equal in
    both figures are on it together, or off it together; one that ties in the one figure and loses in the other is off it.

    Args:
        points: pairs of finite figures.
        minimize: for each figure, whether less is better.

    Returns:
        One answer a point, in the order of `points`.

    Raises:
        UsageError: a figure is not finite.
    """
    for point in points:
        if not all(map(isfinite, point)):
            raise UsageError(f"a Pareto front needs finite figures, got {point}; leave out what was not measured.")
    losses = [tuple(value if less else -value for value, less in zip(point, minimize, strict=True)) for point in points]
    order = sorted(range(len(points)), key=lambda index: losses[index])
    on_front = [False] * len(points)
    least = inf  # of the second figure, among all points that are better in the first
    for _, tied in groupby(order, key=lambda index: losses[index][0]):
        group = list(tied)
        lowest = losses[group[0]][1]
        for index in group:
            on_front[index] = losses[index][1] == lowest < least
        least = min(least, lowest)
    return on_front
