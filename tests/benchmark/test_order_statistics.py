"""Order statistics against samples whose answers are known, and against simulation."""

from __future__ import annotations

import random
from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq.benchmark.order_statistics import median, median_interval, paired_ratios, quantile, summarize
from llmq.errors import UsageError


def test_known_sample() -> None:
    summary = summarize([5.0, 1.0, 4.0, 2.0, 3.0, 100.0])
    assert (summary.count, summary.minimum, summary.maximum) == (6, 1.0, 100.0)
    assert summary.median == 3.5
    assert (summary.quartile_low, summary.quartile_high, summary.iqr) == (2.25, 4.75, 2.5)
    assert summary.mad == 1.5  # deviations 0.5 0.5 1.5 1.5 2.5 96.5
    assert summary.interval == (1.0, 100.0)
    assert summary.coverage == 1 - 2 / 64


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles_are_numpys(samples: list[float], share: float) -> None:
    assert quantile(samples, share) == pytest.approx(float(np.quantile(samples, share)), rel=1e-12, abs=1e-6)
    assert median(samples) == pytest.approx(float(np.median(samples)), rel=1e-12, abs=1e-6)


@pytest.mark.parametrize(
    ("count", "rank", "coverage"),
    # Conover, table A3 of the binomial distribution: twice the tail that is left out
    [(1, 1, 0.0), (2, 1, 0.5), (5, 1, 0.9375), (6, 1, 0.96875), (8, 1, 0.9921875), (9, 2, 0.9609375), (20, 6, 0.95861)],
)
def test_ranks_of_the_interval(count: int, rank: int, coverage: float) -> None:
    low, high, covered = median_interval(list(range(1, count + 1)))
    assert (low, high) == (rank, count + 1 - rank)
    assert covered == pytest.approx(coverage, abs=1e-5)


@pytest.mark.parametrize("count", [3, 5, 9, 30])
def test_the_interval_covers_the_median_of_a_skewed_law_as_often_as_it_says(count: int) -> None:
    rng, trials = random.Random(7), 4000
    true_median = 0.6931471805599453  # of the exponential law
    hits = 0
    for _ in range(trials):
        low, high, coverage = median_interval([rng.expovariate(1.0) for _ in range(count)])
        hits += low <= true_median <= high
    assert hits / trials == pytest.approx(coverage, abs=4 * sqrt(coverage * (1 - coverage) / trials))


def test_standard_error_of_a_normal_sample() -> None:
    rng = random.Random(3)
    stderr = median([summarize([rng.gauss(0, 1) for _ in range(99)]).stderr or 0.0 for _ in range(300)])
    assert stderr == pytest.approx(sqrt(np.pi / 2 / 99), rel=0.1)  # asymptotic error of the median of a normal law


def test_a_single_sample_has_no_standard_error() -> None:
    assert summarize([2.0]).stderr is None


def test_a_monotonic_change_of_unit_moves_the_interval_with_it() -> None:
    seconds = [0.2, 0.25, 0.1, 0.5, 0.4, 0.3, 0.35]
    low, high, _ = median_interval(seconds)
    assert median_interval([1 / sample for sample in seconds])[:2] == (1 / high, 1 / low)


def test_ratios_pair_by_pair() -> None:
    assert paired_ratios([2.0, 3.0], [1.0, 6.0]) == [2.0, 0.5]
    with pytest.raises(UsageError, match="equally many, got 1 and 2"):
        paired_ratios([1.0], [1.0, 2.0])
    with pytest.raises(UsageError, match="positive reference"):
        paired_ratios([1.0], [0.0])


@pytest.mark.parametrize("bad", [[float("nan")], [1.0, float("inf")], []])
def test_samples_that_are_none_are_refused(bad: list[float]) -> None:
    with pytest.raises(UsageError):
        summarize(bad)


def test_a_share_beyond_the_sample_is_refused() -> None:
    with pytest.raises(UsageError, match=r"from 0 to 1, got 1\.5"):
        quantile([1.0], 1.5)
    with pytest.raises(UsageError, match="at least one sample"):
        median_interval([])
