"""What a linear could be given instead of the format it has: another scheme, or no quantization at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmq.algorithms.statistics import Needs
from llmq.api.sensing import GROUPS, WIDE, default_candidates, has_relatives, with_algorithm
from llmq.errors import UsageError
from llmq.numerics.grid import LinearFormat
from llmq.numerics.weight import float_grid
from llmq.schemes.base import ResolvedScheme
from llmq.schemes.overrides import Override
from llmq.schemes.registry import resolve

ORIGINAL = "original"
"""The name of no quantization."""
_WITHOUT_FACTORS = "int4-gptq"
"""Whose algorithm stands for one that needs Fisher factors."""


@dataclass(frozen=True)
class Candidate:
    """A scheme with its options; None: the linear keeps its original weight."""

    scheme: ResolvedScheme | None

    def __str__(self) -> str:
        return ORIGINAL if self.scheme is None else self._override("*").partition("=")[2]

    def argument(self, fqn: str) -> str:
        """Return what gives one linear this, as the command line takes it."""
        return f"--skip '{fqn}'" if self.scheme is None else f"--override '{self._override(fqn)}'"

    def format(self, dtype: torch.dtype) -> LinearFormat:
        """Return what a linear becomes in a model that computes in `dtype`."""
        return LinearFormat(float_grid(dtype)) if self.scheme is None else self.scheme.format

    def _override(self, pattern: str) -> str:
        assert self.scheme is not None
        return str(Override(pattern, self.scheme.name, self.scheme.options_json()))


@dataclass(frozen=True)
class Candidates:
    """All that a linear may be given.

    Attributes:
        each: in the order in which they are tried.
        named: the user asked for these: they may take no more bytes than what is there.
        note: what was put in another's place; empty: nothing was.
    """

    each: tuple[Candidate, ...]
    named: bool = False
    note: str = ""

    @property
    def needs_calibration(self) -> bool:
        """Whether any needs calibration text."""
        return any(each.scheme is not None and each.scheme.needs_calibration for each in self.each)


def settle_candidates(names: Sequence[str], base: ResolvedScheme) -> Candidates:
    """Read 'SCHEME', 'SCHEME:KEY=VALUE,…' or 'original'; without any, those of `llmq sensitivity` and the original weight.

    Raises:
        UsageError: a candidate is unknown, named twice, or needs what is not gathered here.
    """
    if names:
        found = tuple(Candidate(None) if name == ORIGINAL else Candidate(_read(name)) for name in names)
        for name, candidate in zip(names, found, strict=True):
            if found.count(candidate) > 1:
                raise UsageError(f"candidate {name} is named twice; name it once.")
        return Candidates(found, named=True)
    if has_relatives(base):
        schemes = default_candidates(base)
    else:
        sizes = GROUPS if "group_size" in type(base.options).model_fields else ()
        schemes = (*(resolve(base.name, {**base.options_json(), "group_size": size}) for size in sizes), resolve(WIDE))
    note = ""
    if any(Needs.FISHER in each.needs for each in schemes):
        schemes = with_algorithm(schemes, resolve(_WITHOUT_FACTORS))
        note = f"candidates are rounded by {_WITHOUT_FACTORS}'s algorithm: {base.name}'s needs Fisher factors of the whole model"
    return Candidates((*map(Candidate, schemes), Candidate(None)), note=note)


def _read(name: str) -> ResolvedScheme:
    scheme = Override.parse(f"*={name}").resolve()
    if not scheme.format.quantized:
        raise UsageError(f"candidate {name} quantizes nothing; the original weight is called {ORIGINAL}.")
    if Needs.FISHER in scheme.needs:
        raise UsageError(f"candidate {name} needs Fisher factors, which are not estimated here; name one that needs none.")
    if scheme.format.has_input_scale:
        raise UsageError(f"candidate {name} needs a calibrated scale of its inputs; name one with dynamic activations.")
    return scheme
