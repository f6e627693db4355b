"""Verdicts: from a change and its interval to whether a candidate passes. Formulas are in docs/ci.md.

A change is judged by the better end of its interval: a regression is what even that end calls worse than tolerated, so that
chance fails no build. Worse than no change at all, but tolerated, is a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import stats

from llmq.results.figures import plain
from llmq.results.record import Kind
from llmq.results.tolerances import Reaction, SpeedTolerances

Outcome = Literal["pass", "note", "warn", "fail", "incomparable"]
"""What a verdict means for the whole: `fail` ends with exit code 1, `incomparable` with 2, the others with 0."""

_FP32_STEP = 2.0**-23
"""Figures of tokens are stored in fp32; a change of their mean below this share of it is rounding, and no change at all."""

OUTCOME_OF: dict[Reaction, Outcome] = {"fail": "fail", "warn": "warn", "allow": "note"}


class Verdict(StrEnum):
    """What was found of one metric."""

    IDENTICAL = "identical"
    OK = "ok"
    BETTER = "better"
    WORSE = "worse, tolerated"
    REGRESSION = "regression"
    DIFFERENT_KERNEL = "different kernel"
    NOT_COMPARABLE = "not comparable"
    OTHER_MACHINE = "other machine"
    MISSING = "missing"
    NEW = "new"


class Finding(BaseModel):
    """One comparison and its verdict. Numbers that do not exist are None."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    subject: str
    """Label of the scheme, as in tables."""
    kind: Kind | None
    """Of the records; None for what belongs to the subject, such as its size."""
    metric: str
    verdict: Verdict
    outcome: Outcome
    reason: str
    """A sentence: what decided."""
    unit: str = ""
    """Of `baseline` and `candidate`."""
    baseline: float | None = None
    candidate: float | None = None
    change_unit: str = ""
    """Of the numbers below."""
    change: float | None = None
    low: float | None = None
    high: float | None = None
    """The interval of `change`."""
    confidence: float | None = None
    method: str = ""
    """How the interval was found: paired, unpaired, bootstrap, or exact."""
    tolerance: float | None = None
    """How much worse is tolerated, without the noise floor; at least 0."""
    noise_floor: float | None = None
    """How far a scheme is from itself when it is measured twice; None where that was not measured."""


@dataclass(frozen=True, slots=True)
class Metered:
    """Whose metric is judged, in which unit, and what is worse: `worse` is 1 where more is worse, -1 where less is."""

    subject: str
    kind: Kind | None
    metric: str
    unit: str
    worse: Literal[1, -1] = 1


@dataclass(frozen=True, slots=True)
class Change:
    """A difference candidate - baseline, its standard error, and from how many independent units (windows) it comes."""

    baseline: float
    candidate: float
    value: float
    stderr: float | None
    units: int
    method: Literal["paired", "unpaired"]


def identical(what: Metered, value: float) -> Finding:
    """The verdict on figures that are the same for every token, bit for bit."""
    return Finding(
        **_named(what),
        verdict=Verdict.IDENTICAL,
        outcome="pass",
        reason="bit for bit the same for every token",
        baseline=value,
        candidate=value,
        change=0.0,
        change_unit=what.unit,
        method="paired",
    )


def t_interval(value: float, stderr: float, units: int, confidence: float) -> tuple[float, float]:
    """Return Student's interval of a mean over `units` independent units, of which there are two at least."""
    half = float(stats.t.ppf((1 + confidence) / 2, units - 1)) * stderr
    return value - half, value + half


def judge_change(what: Metered, change: Change, tolerance: float, confidence: float) -> Finding:
    """Judge a difference of means; `tolerance` is in its unit."""
    numbers = {
        "baseline": change.baseline,
        "candidate": change.candidate,
        "change": change.value,
        "change_unit": what.unit,
        "tolerance": tolerance,
        "confidence": confidence,
        "method": change.method,
    }
    if change.stderr is None or change.units < 2:
        why = "there is no standard error: measure at least two windows"
        return Finding(**_named(what), verdict=Verdict.NOT_COMPARABLE, outcome="incomparable", reason=why, **numbers)
    low, high = t_interval(change.value, change.stderr, change.units, confidence)
    least = low if what.worse > 0 else -high  # how much worse it is at the least
    most = high if what.worse > 0 else -low
    said = f"{what.metric} is worse by {plain(least)} {what.unit} at the least ({confidence:.0%})"
    rounding = _FP32_STEP * abs(change.baseline)
    if least > -rounding and most < rounding:
        least, most = min(least, 0.0), max(most, 0.0)
    verdict, outcome, reason = _graded(least, most, tolerance, f"{said}; tolerated: {plain(tolerance)}")
    return Finding(**_named(what), verdict=verdict, outcome=outcome, reason=reason, low=low, high=high, **numbers)


def ratio_of_medians(
    candidate: Sequence[float], baseline: Sequence[float], tolerances: SpeedTolerances
) -> tuple[float, float, float]:
    """Return median(candidate) / median(baseline) and its bootstrap interval (percentile; the same for the same samples).

    Both need two samples at least.
    """
    return _bootstrap((np.asarray(candidate, float), np.asarray(baseline, float)), tolerances)


def noise_floor(ratios: Sequence[float], tolerances: SpeedTolerances) -> float:
    """Return how far the median of A / A, whose truth is 1, may be from 1, as a share: the farther end of its interval."""
    _, low, high = _bootstrap((np.asarray(ratios, float),), tolerances)
    return max(1 - low, high - 1, 0.0)


def judge_speed(
    what: Metered,
    candidate: Sequence[float],
    baseline: Sequence[float],
    tolerances: SpeedTolerances,
    *,
    floor: float | None = None,
) -> Finding:
    """Judge samples of a speed (more is better) against those of the baseline; `floor` is the noise floor as a share."""
    ratio, low, high = ratio_of_medians(candidate, baseline, tolerances)
    numbers = {
        "baseline": float(np.median(baseline)),
        "candidate": float(np.median(candidate)),
        "change": 100 * (ratio - 1),
        "change_unit": "%",
        "low": 100 * (low - 1),
        "high": 100 * (high - 1),
        "confidence": tolerances.confidence,
        "method": "bootstrap",
        "tolerance": tolerances.slowdown_percent,
        "noise_floor": None if floor is None else 100 * floor,
    }
    noise = 100 * (floor or 0.0)
    said = (
        f"{what.metric} is lower by {100 * (1 - high):.1f} % at the least ({tolerances.confidence:.0%}); "
        f"tolerated: {tolerances.slowdown_percent:g} %" + (f" + noise floor {noise:.1f} %" if floor is not None else "")
    )
    # what lies within the noise floor is no change at all
    verdict, outcome, reason = _graded(100 * (1 - high) - noise, 100 * (1 - low) + noise, tolerances.slowdown_percent, said)
    return Finding(**_named(what), verdict=verdict, outcome=outcome, reason=reason, **numbers)


def judge_minimum(what: Metered, ratios: Sequence[float], minimum: float, tolerances: SpeedTolerances, floor: float) -> Finding:
    """Judge samples of a ratio against the least that is demanded of it; the noise floor is tolerated."""
    ratio, low, high = _bootstrap((np.asarray(ratios, float),), tolerances)
    fails = high < minimum * (1 - floor)
    return Finding(
        **_named(what),
        verdict=Verdict.REGRESSION if fails else Verdict.OK,
        outcome="fail" if fails else "pass",
        reason=f"{what.metric} is {high:.2f} at the most ({tolerances.confidence:.0%}); demanded: {minimum:g} - noise floor "
        f"{100 * floor:.1f} %"
        if fails
        else f"at least {minimum:g} is demanded",
        baseline=minimum,
        candidate=ratio,
        change=100 * (ratio / minimum - 1),
        change_unit="%",
        low=100 * (low / minimum - 1),
        high=100 * (high / minimum - 1),
        confidence=tolerances.confidence,
        method="bootstrap",
        tolerance=0.0,
        noise_floor=100 * floor,
    )


def judge_exact(what: Metered, baseline: float, candidate: float, tolerance: float) -> Finding:
    """Judge a figure that has no error: what is more than tolerated fails."""
    grown = candidate - baseline
    said = f"{what.metric} grew by {plain(grown)} {what.unit}; tolerated: {plain(tolerance)}" if grown > 0 else ""
    verdict, outcome, reason = (
        (Verdict.IDENTICAL, "pass", "exactly the same") if grown == 0 else _graded(grown, grown, tolerance, said)
    )
    return Finding(
        **_named(what),
        verdict=verdict,
        outcome=outcome,
        reason=reason,
        baseline=baseline,
        candidate=candidate,
        change=grown,
        change_unit=what.unit,
        tolerance=tolerance,
        method="exact",
    )


def unjudged(what: Metered, verdict: Verdict, outcome: Outcome, reason: str) -> Finding:
    """A verdict that needs no number."""
    return Finding(**_named(what), verdict=verdict, outcome=outcome, reason=reason)


def _graded(least: float, most: float, tolerance: float, said: str) -> tuple[Verdict, Outcome, str]:
    """Grade something that is worse by `least` to `most`; `said` is the reason where it is worse."""
    if least > tolerance:
        return Verdict.REGRESSION, "fail", said
    if least > 0:
        return Verdict.WORSE, "warn", said
    if most < 0:
        return Verdict.BETTER, "pass", "better, beyond chance"
    return Verdict.OK, "pass", "no change beyond chance"


def _bootstrap(samples: tuple[NDArray[np.float64], ...], tolerances: SpeedTolerances) -> tuple[float, float, float]:
    """Return the median of the first sample, over that of the second where there is one, and its interval."""

    def statistic(*drawn: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        medians = [np.median(each, axis=axis) for each in drawn]
        return np.asarray(medians[0] / medians[1] if len(medians) == 2 else medians[0])

    interval = stats.bootstrap(
        samples,
        statistic,
        n_resamples=tolerances.resamples,
        vectorized=True,
        confidence_level=tolerances.confidence,
        method="percentile",  # others need the spread of the resamples, which is 0 where a clock is coarse
        rng=np.random.default_rng(tolerances.seed),
    ).confidence_interval
    return float(statistic(*samples)), float(interval.low), float(interval.high)


def _named(what: Metered) -> dict[str, object]:
    return {"subject": what.subject, "kind": what.kind, "metric": what.metric, "unit": what.unit}
