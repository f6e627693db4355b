"""Order statistics of timing samples. Times are skewed to the right by whatever else the machine did, so nothing is averaged.

Everything here is distribution-free: the median and its confidence interval are order statistics, which means that a
monotonic transformation (seconds -> tokens/s) of the samples transforms them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, isfinite
from statistics import NormalDist

from llmq.errors import UsageError


@dataclass(frozen=True, slots=True)
class Summary:
    """Order statistics of a sample, all in the unit of the sample."""

    count: int
    median: float
    minimum: float
    maximum: float
    quartile_low: float
    quartile_high: float
    mad: float
    """Median absolute deviation from the median, not scaled to a standard deviation."""
    interval: tuple[float, float]
    """Confidence interval of the median: two samples; see `median_interval`."""
    coverage: float
    """Probability that `interval` covers the true median: at least 95 % from 6 samples on, less below, 0 for one sample."""

    @property
    def iqr(self) -> float:
        """Interquartile range."""
        return self.quartile_high - self.quartile_low

    @property
    def stderr(self) -> float | None:
        """Standard error of the median: that of a normal law with this interval and coverage; None for a single sample."""
        if self.count < 2:
            return None
        return (self.interval[1] - self.interval[0]) / (2 * NormalDist().inv_cdf((1 + self.coverage) / 2))


def quantile(samples: Sequence[float], share: float) -> float:
    """Return the `share` quantile of `samples`, linear between neighbours (Hyndman & Fan 1996, type 7, as numpy's default)."""
    if not samples:
        raise UsageError("a quantile needs at least one sample, got none.")
    if not 0 <= share <= 1:
        raise UsageError(f"a quantile's share must be from 0 to 1, got {share}.")
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def median(samples: Sequence[float]) -> float:
    """Return the median of `samples`."""
    return quantile(samples, 0.5)


def median_interval(samples: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the narrowest symmetric pair of order statistics that covers the true median with `confidence`, or all of them.

    The number of independent samples below the median is Binomial(n, 1/2), so `[x_(r), x_(n+1-r)]` covers it with
    probability `1 - 2 P(B < r)`, whatever the distribution (Conover, Practical Nonparametric Statistics, 3rd ed., section
    3.2). Fewer than 6 samples cannot reach 95 %: then the interval is their whole range, and its coverage `1 - 2**(1-n)`.

    Returns:
        (low, high, coverage).
    """
    if not samples:
        raise UsageError("the interval of a median needs at least one sample, got none.")
    count = len(samples)
    rank, below = 1, 1  # below: how many of the 2**count equally likely patterns have fewer than `rank` samples on one side
    while rank + 1 <= (count + 1) // 2 and 2 * (below + comb(count, rank)) <= (1 - confidence) * 2**count:
        below += comb(count, rank)
        rank += 1
    ordered = sorted(samples)
    return ordered[rank - 1], ordered[count - rank], 1 - 2 * below / 2**count


def summarize(samples: Sequence[float]) -> Summary:
    """Return the order statistics of `samples`.

    Raises:
        UsageError: there is no sample, or one is not finite.
    """
    if not all(isfinite(sample) for sample in samples):
        raise UsageError(f"timing samples must be finite numbers, got {list(samples)}.")
    middle = median(samples)
    low, high, coverage = median_interval(samples)
    return Summary(
        count=len(samples),
        median=middle,
        minimum=min(samples),
        maximum=max(samples),
        quartile_low=quantile(samples, 0.25),
        quartile_high=quantile(samples, 0.75),
        mad=median([abs(sample - middle) for sample in samples]),
        interval=(low, high),
        coverage=coverage,
    )


def paired_ratios(samples: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Return `samples[i] / reference[i]`: what was measured in the same round shares the machine's mood of that moment.

    Raises:
        UsageError: the two differ in length, or a reference sample is not positive.
    """
    if len(samples) != len(reference):
        raise UsageError(f"paired samples must be equally many, got {len(samples)} and {len(reference)}.")
    if any(value <= 0 for value in reference):
        raise UsageError("a paired ratio needs positive reference samples; time something that takes longer than a clock tick.")
    return [sample / base for sample, base in zip(samples, reference, strict=True)]
