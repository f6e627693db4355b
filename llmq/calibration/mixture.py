"""Mixtures of calibration texts: how they are named, and how many windows each one gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from llmq.errors import UsageError

FORM = "SOURCE or SOURCE=WEIGHT, such as wiki.txt=0.7"


@dataclass(frozen=True, slots=True)
class WeightedSource:
    """One source of a mixture.

    Attributes:
        source: what it is read from; None is the default text.
        weight: its share of the windows is this over the sum of all weights.
    """

    source: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UsageError(f"the weight of calibration source {self.source} must be a positive number, got {self.weight:g}.")


def parse_sources(texts: Sequence[str]) -> tuple[WeightedSource, ...]:
    """Read sources as the command line names them; none at all is the default text.

    What exists under the whole name is taken as that file, even with an equals sign in its name.

    Args:
        texts: each SOURCE or SOURCE=WEIGHT; weights for all of several, or for none (then they weigh the same).

    Raises:
        UsageError: a weight is no positive number, some have one and some have not, or a source is named twice.
    """
    parsed = [_parse(text) for text in texts]
    with_weight = [weight is not None for _, weight in parsed]
    if any(with_weight) and not all(with_weight):
        bare = parsed[with_weight.index(False)][0]
        raise UsageError(f"calibration source {bare} has no weight, and others have one; give each one a weight, or none.")
    names = [source for source, _ in parsed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"calibration source {twice} is named twice; name it once, with a larger weight.")
    return tuple(WeightedSource(source, 1.0 if weight is None else weight) for source, weight in parsed) or (WeightedSource(),)


def _parse(text: str) -> tuple[str, float | None]:
    name, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        if not text.strip():
            raise UsageError(f"--calibration takes {FORM}; got {text!r}.")
        return text, None
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not (math.isfinite(weight) and weight > 0):
        raise UsageError(f"--calibration takes {FORM}, with a weight above 0; got {text!r}.")
    return name, weight


def share_out(weights: Sequence[float], total: int) -> list[int]:
    """Share `total` windows out by weights: the method of the largest remainder (Hamilton's).

    Each one gets the whole part of its quota `total * weight / sum`, and what is left goes one by one to the largest
    remainders, the first of equal ones first. Quotas are exact fractions, so no rounding decides.

    Args:
        weights: positive.
        total: at least 0.

    Returns:
        The windows of each, which sum to `total`; none is more than one away from its quota.
    """
    exact = [Fraction(weight) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    shares = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda index: (shares[index] - quotas[index], index))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def largest_mixture(weights: Sequence[float], available: Sequence[int], at_most: int) -> list[int] | None:
    """Return the shares of the largest number of windows, up to `at_most`, that every source has and gets some of."""
    for total in range(at_most, 0, -1):
        shares = share_out(weights, total)
        if all(1 <= share <= has for share, has in zip(shares, available, strict=True)):
            return shares
    return None
