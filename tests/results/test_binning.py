"""Histograms: every value in its bin, edges that all histograms share, zeros apart."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from llmq.results.binning import histogram
from llmq.results.record import Histogram


def test_every_value_is_in_its_bin() -> None:
    values = np.array([0.0, 1.0, 1.5, 9.99, 10.0, 0.0123, 0.0])
    found = histogram(values, "nats", per_decade=5)
    assert found.zeros == 2
    assert found.total == values.size
    for low, high, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
        assert count == int(((values >= low) & (values < high)).sum())
    assert found.counts[0] > 0 < found.counts[-1]  # nothing empty at the ends


@pytest.mark.parametrize("value", [1.0, 1e-30, 3.7e12, 0.1, 10 ** (3 / 5)])
def test_a_single_value(value: float) -> None:
    found = histogram([value], "s", per_decade=5)
    assert (found.counts, found.zeros) == ([1], 0)
    assert found.edges[0] <= value < found.edges[1]
    assert found.edges[1] / found.edges[0] == pytest.approx(10 ** (1 / 5))


def test_edges_do_not_depend_on_the_values() -> None:
    few, many = histogram([0.5], "s", per_decade=40), histogram([0.001, 0.5, 80.0], "s", per_decade=40)
    assert set(few.edges) <= set(many.edges)


def test_nothing_but_zeros() -> None:
    assert histogram([0.0, 0.0], "nats", per_decade=5) == Histogram(unit="nats", edges=[], counts=[], zeros=2)


@pytest.mark.parametrize(("edges", "counts"), [([1.0, 2.0], []), ([2.0, 1.0], [1]), ([1.0], [1])])
def test_edges_and_counts_that_do_not_fit(edges: list[float], counts: list[int]) -> None:
    with pytest.raises(ValidationError, match="edges, ascending"):
        Histogram(unit="s", edges=edges, counts=counts)
