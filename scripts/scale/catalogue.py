"""The cases of scripts/measure_scale.py: random checkpoints of some shapes, and what is quantized of them."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from llmq.errors import UsageError

SMALL_TABLE = ("--vocab-size", "8192")
SHAPES: dict[str, tuple[str, ...]] = {
    "40M": ("--hidden-size", "1024", "--intermediate-size", "2816", "--heads", "16", "--kv-heads", "4", *SMALL_TABLE),
    "36M-wide": ("--hidden-size", "768", "--intermediate-size", "4096", "--heads", "12", "--kv-heads", "12", *SMALL_TABLE),
    "1.1B": (),
    "7B": ("--hidden-size", "4096", "--intermediate-size", "11008", "--heads", "32", "--kv-heads", "32"),
}
"""Widths by name, as scripts/make_random_checkpoint.py takes them."""


@dataclass(frozen=True, slots=True)
class Case:
    """One quantization: a shape with so many blocks, a scheme, and windows of so many tokens (0: it is data-free)."""

    shape: str
    blocks: int
    scheme: str
    windows: int = 0
    length: int = 256
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the row."""
        calibration = (f"{self.windows}x{self.length}",) if self.windows else ()
        return " ".join((self.model, self.scheme, *self.options, *calibration))

    @property
    def model(self) -> str:
        """Name of the checkpoint's folder."""
        return f"{self.shape}-{self.blocks}"


CASES = (
    Case("40M", 2, "int4"),
    Case("40M", 2, "int4-gptq", 16),
    Case("40M", 2, "int4-yaqa", 16),
    Case("36M-wide", 2, "int4-gptq", 16),
    Case("36M-wide", 2, "int4-yaqa", 16),
    Case("1.1B", 3, "int4"),
    Case("1.1B", 3, "int4-gptq", 128),
    Case("1.1B", 22, "int4-gptq", 4, 2048),
    Case("7B", 2, "int4"),
    Case("7B", 2, "int4-gptq", 8),
    Case("7B", 32, "int4"),
    Case("7B", 32, "int4", options=("search=range",)),
)


def choose(patterns: list[str]) -> list[Case]:
    """Return the cases whose names match one of the patterns; raises UsageError for a pattern that matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in CASES):
            raise UsageError(f"no case matches {pattern!r}; cases are {'; '.join(case.name for case in CASES)}.")
    return [case for case in CASES if any(fnmatchcase(case.name, pattern) for pattern in patterns)]
