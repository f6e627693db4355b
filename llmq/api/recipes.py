"""Recipe: what is to be done to a model's linears, and what that means for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from llmq.api.calibrating import CalibrationSource
from llmq.checkpoint.rotated import settle_rotation
from llmq.model.llama import Llama
from llmq.results.coverage import Coverage
from llmq.schemes.apply import decide
from llmq.schemes.cover import Decision
from llmq.schemes.overrides import Override, assign_overrides
from llmq.schemes.registry import ResolvedScheme, resolve

HEAD = "lm_head"
HEAD_KEPT = "the output head is kept unless --lm-head"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A scheme by name, its options as text, which linears it leaves alone, and which get another one."""

    scheme: str
    options: Mapping[str, Any] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    skip_unfit: bool = False
    lm_head: bool = False
    calibration: CalibrationSource = field(default_factory=CalibrationSource)
    overrides: tuple[Override, ...] = ()
    allocation: Mapping[str, Any] | None = None
    """What the overrides were solved from, where a budget was; for the manifest."""
    rotate: str = "auto"
    """Which rotations are folded into the weights first; see `checkpoint.rotated.Rotate`."""

    def resolve(self) -> ResolvedScheme:
        """Validate the name and the options."""
        return resolve(self.scheme, dict(self.options))

    def skipped(self, fqns: list[str]) -> tuple[str, ...]:
        """The user's patterns and, unless it is to be quantized too, the output head of a model that has these linears."""
        overridden = any(override.matches(HEAD) and override.pattern == HEAD for override in self.overrides)
        head = (HEAD,) if not self.lm_head and not overridden and HEAD in fqns else ()
        return (*self.skip, *head)

    def explain(self, coverage: Coverage) -> Coverage:
        """Say of an output head that nobody asked to skip why it was left alone."""
        if self.lm_head or any(fnmatchcase(HEAD, pattern) for pattern in self.skip):
            return coverage
        rows = (replace(row, reason=HEAD_KEPT) if row.fqn == HEAD and row.reason else row for row in coverage.rows)
        return replace(coverage, rows=tuple(rows))


@dataclass(frozen=True)
class Settled:
    """A recipe for one model.

    Attributes:
        resolved: the scheme of every linear that no override matches.
        decisions: what is to become of every parameter.
        overrides: schemes of single linears, by fqn.
        skip: the patterns of what is left alone.
        rotate: which rotations are folded into the weights first.
    """

    resolved: ResolvedScheme
    decisions: list[Decision]
    overrides: Mapping[str, ResolvedScheme]
    skip: tuple[str, ...]
    rotate: str

    @property
    def needs_calibration(self) -> bool:
        """Whether any linear's scheme needs calibration text."""
        return any(decision.scheme.needs_calibration for decision in self.decisions if decision.scheme is not None)


def settle(recipe: Recipe, model: Llama, dtype: torch.dtype) -> Settled:
    """Decide what a recipe means for every parameter of a model, which may be on the meta device.

    Raises:
        UsageError: the scheme, an option or a pattern is unknown, or overrides contradict each other.
        SchemeError: the model cannot be rotated as the recipe says.
        ShapeError: linears do not fit.
    """
    resolved = recipe.resolve()
    fqns = linear_fqns(model)
    skip = recipe.skipped(fqns) if resolved.baseline_dtype is None else recipe.skip
    kept = [fqn for fqn in fqns if fqn not in skip]
    overrides = assign_overrides(recipe.overrides, kept, skip=recipe.skip)
    compute = resolved.baseline_dtype or dtype
    decisions = decide(model, resolved, skip=skip, skip_unfit=recipe.skip_unfit, dtype=compute, overrides=overrides)
    return Settled(resolved, decisions, overrides, skip, settle_rotation(recipe.rotate, model.config, resolved))


def linear_fqns(model: torch.nn.Module) -> list[str]:
    """Names of all linears, in the model's order."""
    return [fqn for fqn, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
