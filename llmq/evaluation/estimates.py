"""Standard errors of means over tokens, when neighbouring tokens are not independent.

The losses of neighbouring tokens correlate (a hard paragraph is hard throughout), so the textbook error of a mean over tokens
is too small. Batch means take the windows of an evaluation, which are far less correlated, as the independent units
(Law & Kelton, Simulation Modeling and Analysis, "batch means"). Windows may hold unequally many tokens: then the mean is a
ratio of two sums over windows, with the linearised error of a ratio estimate (Cochran, Sampling Techniques, 3rd ed.,
section 6.3). Sums are in double precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its standard error, in the same unit; None where fewer than two independent units exist."""

    value: float
    stderr: float | None


def batch_sums(values: Tensor, sizes: Tensor) -> Tensor:
    """Sum `values` [n] over consecutive batches of `sizes` [W] tokens; returns float64 [W]."""
    batch = torch.repeat_interleave(torch.arange(sizes.numel()), sizes.long())
    return torch.zeros(sizes.numel(), dtype=torch.float64).index_add_(0, batch, values.double())


def ratio_estimate(sums: Tensor, weights: Tensor) -> Estimate:
    """Estimate Σ sums / Σ weights over W independent units; `sums` and `weights` are [W]."""
    sums, weights = sums.double(), weights.double()
    count, total = sums.numel(), weights.sum()
    ratio = sums.sum() / total
    if count < 2:
        return Estimate(float(ratio), None)
    residuals = sums - ratio * weights
    return Estimate(float(ratio), float((residuals.square().sum() * count / (count - 1)).sqrt() / total))


def batch_means(values: Tensor, sizes: Tensor) -> Estimate:
    """Estimate the mean of `values` [n] from consecutive batches of `sizes` [W] tokens each."""
    return ratio_estimate(batch_sums(values, sizes), sizes)


def naive_stderr(values: Tensor) -> float | None:
    """Return the standard error that the mean of `values` [n] would have if all of them were independent."""
    if values.numel() < 2:
        return None
    return float(values.double().std() / values.numel() ** 0.5)
