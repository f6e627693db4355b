"""Coverage: what a scheme did to every module of a model that owns a weight, and why not where it did nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any


@dataclass(frozen=True, slots=True)
class CoverageRow:
    """One module that owns a weight.

    Attributes:
        fqn: fully qualified name of the module.
        shape: of its weight; [N, K] for a linear.
        source: dtype the weight had, such as 'bfloat16'.
        target: what it has become, such as 'int4 g128 float zero'; None where the scheme left it alone.
        dtype: what it is stored as now: `target`, or the dtype of a module that was left alone.
        reason: why it was left alone; empty where it was not.
        nbytes: bytes its weight takes now, scales and zero points included; 0 where the memory is another module's.
        tied_to: fqn of the module whose memory this one shares.
        sqnr_db: signal to quantization noise of a quantized weight, in dB; None for others.
    """

    fqn: str
    shape: tuple[int, ...]
    source: str
    target: str | None
    dtype: str
    reason: str
    nbytes: int
    tied_to: str | None = None
    sqnr_db: float | None = None

    @property
    def elements(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits over the number of elements; 0 where the memory is another module's."""
        return 8 * self.nbytes / self.elements if self.elements else 0.0


@dataclass(frozen=True, slots=True)
class Coverage:
    """Every module that owns a weight, in the model's order."""

    scheme: str
    rows: tuple[CoverageRow, ...]

    @property
    def quantized(self) -> tuple[CoverageRow, ...]:
        """What the scheme covered."""
        return tuple(row for row in self.rows if row.target is not None)

    @property
    def skipped(self) -> dict[str, str]:
        """Reason by fqn for what the scheme left alone."""
        return {row.fqn: row.reason for row in self.rows if row.target is None}

    @property
    def bits_per_weight(self) -> float | None:
        """All stored bits of what was covered over its elements; None where nothing was."""
        own = [row for row in self.quantized if row.tied_to is None]
        elements = sum(row.elements for row in own)
        return 8 * sum(row.nbytes for row in own) / elements if elements else None

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, shared memory counted once."""
        return sum(row.nbytes for row in self.rows)

    def summary(self) -> str:
        """One sentence: how much was covered, and what was not."""
        reasons: dict[str, int] = {}
        for reason in self.skipped.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        left = "; ".join(f"{count} left ({reason})" for reason, count in reasons.items()) or "nothing left"
        return f"{self.scheme}: {len(self.quantized)} of {len(self.rows)} weights covered; {left}."

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it."""
        return {"scheme": self.scheme, "rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Coverage:
        """Inverse of `to_json`."""
        rows = (CoverageRow(**{**row, "shape": tuple(row["shape"])}) for row in data["rows"])
        return cls(data["scheme"], tuple(rows))
