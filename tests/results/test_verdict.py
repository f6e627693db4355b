"""Verdicts from changes and their intervals, against hand-worked numbers."""

from __future__ import annotations

import numpy as np
import pytest

from llmq.results.tolerances import read_tolerances
from llmq.results.verdict import (
    Change,
    Metered,
    Verdict,
    judge_change,
    judge_exact,
    judge_minimum,
    judge_speed,
    noise_floor,
    ratio_of_medians,
    t_interval,
)

SPEED = read_tolerances().speed
LOSS = Metered("int4", "perplexity", "ln perplexity", "nats/token")
TOP = Metered("int4", "divergence", "same top-1", "%", worse=-1)
RATE = Metered("int4", "decode", "decode tokens/s", "tokens/s", worse=-1)


def test_students_interval() -> None:
    # t of 4 degrees of freedom: 2.776 for 95 %, 4.604 for 99 % (every table of the distribution)
    low, high = t_interval(1.0, 0.1, 5, 0.95)
    assert (low, high) == (pytest.approx(1 - 0.2776, abs=1e-4), pytest.approx(1 + 0.2776, abs=1e-4))
    assert t_interval(0.0, 1.0, 5, 0.99)[1] == pytest.approx(4.604, abs=1e-3)


def change(value: float, stderr: float | None, units: int = 5) -> Change:
    return Change(3.0, 3.0 + value, value, stderr, units, "paired")


@pytest.mark.parametrize(
    ("value", "verdict", "outcome"),
    [
        (0.0065, Verdict.REGRESSION, "fail"),  # 0.0065 - 4.604 * 0.00097 = 0.00203 > 0.002
        (0.0064, Verdict.WORSE, "warn"),  # 0.00193
        (0.0044, Verdict.OK, "pass"),  # -0.0001: may be chance
        (-0.0044, Verdict.OK, "pass"),
        (-0.0046, Verdict.BETTER, "pass"),
    ],
)
def test_a_change_is_judged_by_the_better_end_of_its_interval(value: float, verdict: Verdict, outcome: str) -> None:
    found = judge_change(LOSS, change(value, 0.00097), 0.002, 0.99)
    assert (found.verdict, found.outcome) == (verdict, outcome)
    mirrored = judge_change(TOP, change(-value, 0.00097), 0.002, 0.99)  # where less is worse, the other end decides
    assert (mirrored.verdict, mirrored.outcome) == (verdict, outcome)


def test_rounding_of_stored_figures_is_no_change() -> None:
    other_cpu = judge_change(LOSS, change(1.1e-7, 1e-9, units=32), 0.002, 0.99)  # 3 nats in fp32 have steps of 2.4e-7
    assert other_cpu.verdict == Verdict.OK
    assert judge_change(LOSS, change(-1.1e-7, 1e-9, units=32), 0.002, 0.99).verdict == Verdict.OK
    assert judge_change(LOSS, change(1e-6, 1e-9, units=32), 0.002, 0.99).verdict == Verdict.WORSE


def test_few_windows_cannot_fail_and_one_is_not_comparable() -> None:
    assert judge_change(LOSS, change(0.06, 0.00097, units=2), 0.002, 0.99).outcome == "pass"  # t of 1 degree is 63.7
    for alone in (change(0.5, None), change(0.5, 0.01, units=1)):
        found = judge_change(LOSS, alone, 0.002, 0.99)
        assert (found.verdict, found.outcome) == (Verdict.NOT_COMPARABLE, "incomparable")
        assert "at least two windows" in found.reason


def rates(rate: float, spread: float, seed: int, n: int = 31) -> list[float]:
    return [float(each) for each in rate * np.random.default_rng(seed).normal(1, spread, n)]


def test_ratio_of_medians_has_the_interval_of_both_sides_and_repeats_itself() -> None:
    fast, slow = rates(200, 0.02, 1), rates(100, 0.02, 2)
    ratio, low, high = ratio_of_medians(fast, slow, SPEED)
    assert ratio == pytest.approx(np.median(fast) / np.median(slow))
    assert low < 2 < high
    # the error of a median of n normal values is 1.25 sigma / sqrt(n); of the ratio of two, sqrt(2) times that
    expected = 2 * 2.576 * 1.2533 * 0.02 / 31**0.5 * 2**0.5
    assert (high - low) / 2 == pytest.approx(expected, rel=0.5)
    assert ratio_of_medians(fast, slow, SPEED) == (ratio, low, high)


@pytest.mark.parametrize(
    ("rate", "floor", "verdict"),
    [
        (80, None, Verdict.REGRESSION),
        (80, 0.16, Verdict.WORSE),  # tolerance and noise floor together are not exceeded
        (80, 0.25, Verdict.OK),  # all of it lies within the noise floor
        (96, None, Verdict.WORSE),
        (100, None, Verdict.OK),
        (120, None, Verdict.BETTER),
        (120, 0.25, Verdict.OK),
    ],
)
def test_a_slowdown_fails_beyond_tolerance_and_noise_floor(rate: float, floor: float | None, verdict: Verdict) -> None:
    found = judge_speed(RATE, rates(rate, 0.01, 1), rates(100, 0.01, 2), SPEED, floor=floor)
    assert found.verdict == verdict, found.reason
    assert found.noise_floor == (None if floor is None else 100 * floor)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= rate - 100 <= found.high or abs(found.low - (rate - 100)) < 3


def test_wide_samples_cannot_fail() -> None:
    assert judge_speed(RATE, rates(85, 0.5, 1, 5), rates(100, 0.5, 2, 5), SPEED).outcome == "pass"


def test_noise_floor_is_the_far_end_of_the_interval_of_a_over_a() -> None:
    assert noise_floor([1.0] * 9, SPEED) == 0
    assert noise_floor([0.9] * 9, SPEED) == pytest.approx(0.1)  # always slower the second time: a bias counts too
    assert noise_floor([1.25] * 9, SPEED) == pytest.approx(0.25)
    assert 0.002 < noise_floor(rates(1, 0.01, 3), SPEED) < 0.02


def test_a_demanded_ratio() -> None:
    ratios = rates(3.0, 0.01, 4)
    assert judge_minimum(RATE, ratios, 2.9, SPEED, 0.0).verdict == Verdict.OK
    assert judge_minimum(RATE, ratios, 3.3, SPEED, 0.0).verdict == Verdict.REGRESSION
    assert judge_minimum(RATE, ratios, 3.3, SPEED, 0.1).verdict == Verdict.OK


def test_sizes_are_exact() -> None:
    size = Metered("int4", None, "size", "bytes")
    assert judge_exact(size, 100, 100, 0).verdict == Verdict.IDENTICAL
    assert judge_exact(size, 100, 101, 0).verdict == Verdict.REGRESSION
    assert judge_exact(size, 100, 101, 1).verdict == Verdict.WORSE
    assert judge_exact(size, 100, 99, 0).verdict == Verdict.BETTER
