"""LayerReport: what quantizing one linear cost, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from llmq.numerics.weight import QuantizedWeight

PANEL_ROWS = 128
"""Rows of a weight that are held in fp64 at a time."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What quantizing one linear cost.

    Attributes:
        fqn: fully qualified name of the linear.
        shape: (N, K) of its weight.
        sqnr_db: 10 log10(sum W^2 / sum (W - W_hat)^2) over the weight, in dB; None for an exact or an all-zero weight.
        loss: tr(E H E^T) of the codes that were kept, E = W - W_hat; H = 2/n sum x^T x makes it twice the mean squared
            error of the outputs of one token, summed over outputs. None where no statistics of the inputs were used.
        rtn_loss: the same for rounding to nearest on the same grid; never below `loss`.
        damping: what was added to the Hessian's diagonal, as a fraction of the diagonal's mean.
        dead_columns: inputs that were zero in the whole calibration set.
        rtn_rows: rows for which rounding to nearest lost less, and was kept.
        fallback: why rounding to nearest was used for the whole layer; None where it was not.
        tuned: the block was then learned as a whole, with other codes.
        format: what the linear became, as plain data, where that is not its scheme's format; None where it is.
        seconds: wall time. Not part of `to_json`: the same run writes the same bytes.
    """

    fqn: str
    shape: tuple[int, int]
    sqnr_db: float | None
    loss: float | None = None
    rtn_loss: float | None = None
    damping: float | None = None
    dead_columns: int = 0
    rtn_rows: int = 0
    fallback: str | None = None
    tuned: bool = False
    format: dict[str, Any] | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest; `from_json` reads it."""
        return {key: value for key, value in asdict(self).items() if key != "seconds"}

    @classmethod
    def from_json(cls, data: dict[str, Any], *, seconds: float = 0.0) -> LayerReport:
        """Inverse of `to_json`."""
        n, k = data["shape"]
        return cls(**{**data, "shape": (n, k)}, seconds=seconds)

    def after_tuning(self, weight: Tensor, quantized: Tensor, *, seconds: float) -> LayerReport:
        """Return the report of a weight [N, K] whose block was tuned as a whole after it was quantized.

        The codes are others now and aim at the block's output: their own loss is not known.
        """
        noise = sqnr_db(weight, quantized)
        return replace(self, sqnr_db=noise, loss=None, rtn_loss=None, tuned=True, seconds=self.seconds + seconds)


def sqnr_db(weight: Tensor, quantized: Tensor | QuantizedWeight) -> float | None:
    """Return the signal to quantization noise ratio of a weight [N, K] in dB; None when noise or signal is zero.

    By panels of rows: in fp64, copies of a whole weight would be the largest there are.
    """
    signal = noise = 0.0
    for start in range(0, len(weight), PANEL_ROWS):
        stop = min(start + PANEL_ROWS, len(weight))
        other = quantized[start:stop] if isinstance(quantized, Tensor) else quantized.rows(start, stop).dequantize()
        original = weight[start:stop].double()
        signal += original.square().sum().item()
        noise += (original - other.double()).square().sum().item()
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
