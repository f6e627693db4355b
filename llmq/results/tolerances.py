"""Tolerances: how much worse a candidate may be before it is a regression. One file, one key a metric, the unit in its name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field

from llmq.results.toml_file import Settings, read_toml

Reaction = Literal["fail", "warn", "allow"]


class QualityTolerances(Settings):
    """Of a change in quality. A change fails when even the better end of its interval is worse than tolerated."""

    confidence: float = Field(gt=0.5, lt=1, description="of the intervals, two-sided")
    ln_perplexity_increase_nats: float = Field(ge=0, description="0.002 is 0.2 % of perplexity")
    kl_increase_nats: float = Field(ge=0, description="of the mean divergence from the reference")
    kl_increase_percent: float = Field(ge=0, description="of the baseline's; the larger of the two counts")
    top1_agreement_loss_percent: float = Field(ge=0, description="percentage points of all scored tokens")


class SpeedTolerances(Settings):
    """Of a change in speed. A slowdown fails when the better end of its interval is beyond tolerance and noise floor."""

    confidence: float = Field(gt=0.5, lt=1)
    slowdown_percent: float = Field(ge=0, lt=100)
    resamples: int = Field(ge=100, le=1_000_000, description="of the bootstrap")
    seed: int = Field(ge=0, description="of the bootstrap: the same samples give the same verdict")
    different_kernel: Reaction = Field(description="other kernels ran than in the baseline, on a CPU of the same features")


class SizeTolerances(Settings):
    """Of a change in size, which is exact."""

    growth_bytes: int = Field(ge=0)
    growth_bits_per_weight: float = Field(ge=0)


class Tolerances(Settings):
    """A file of tolerances; every key has to be there, so that the file alone says what the gate does."""

    quality: QualityTolerances
    speed: SpeedTolerances
    size: SizeTolerances
    missing: Reaction = Field(description="the candidate has no measurement of something that the baseline has")


def read_tolerances(path: Path | None = None) -> Tolerances:
    """Read a file of tolerances; None reads llmq's own.

    Raises:
        InputError: see `read_toml`.
    """
    return read_toml(path or default_tolerances(), Tolerances, "tolerances")


def default_tolerances() -> Path:
    """Return where llmq's own tolerances lie, in a checkout as in an installed package."""
    return Path(str(files("llmq") / "assets" / "regression.toml"))
