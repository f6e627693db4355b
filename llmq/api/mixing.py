"""Mixed precision: a scheme for each linear, so that the model loses least under a budget of bits or bytes.

What each linear loses under each candidate is measured once (`sensing`) and kept; a budget is then solved in well under a
second, exactly, and the answer is a list of overrides.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from llmq.algorithms.allocate import Allocation, allocate
from llmq.api.loading import Setup
from llmq.api.recipes import Recipe, Settled
from llmq.api.sensing import WIDE, open_original, own_linears, settle_original, with_algorithm
from llmq.calibration.sensitivity_file import SensitivityTable
from llmq.errors import UsageError
from llmq.schemes.base import ResolvedScheme
from llmq.schemes.cover import coverage
from llmq.schemes.overrides import Override

_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, slots=True)
class Target:
    """The budget: one of bits per weight or bytes.

    Attributes:
        bits_per_weight: of the linears that are quantized, scales and zero points included.
        size_bytes: of the file: those linears and everything else.
    """

    bits_per_weight: float | None = None
    size_bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.bits_per_weight is None) == (self.size_bytes is None):
            raise UsageError("a budget is either bits per weight (--target-bpw) or a size (--target-size); name one of them.")
        value = self.bits_per_weight if self.bits_per_weight is not None else self.size_bytes
        if value is None or not (math.isfinite(value) and value > 0):
            raise UsageError(f"a budget is a positive number, got {value}.")

    def __str__(self) -> str:
        return f"{self.bits_per_weight:g} bits per weight" if self.bits_per_weight is not None else f"{self.size_bytes:,} bytes"


def parse_size(text: str) -> int:
    """Read a size in bytes: '4GB' is 4,000,000,000, '4GiB' 4,294,967,296; raises UsageError for anything else."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or (found[3] and not found[2]):
        raise UsageError(f"--target-size takes a size such as 4GB, 3.5GiB or 900MB; got {text!r}.")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** _POWERS[found[2].lower()])


@dataclass(frozen=True, slots=True)
class MixedRow:
    """What one linear gets.

    Attributes:
        fqn: its name.
        scheme: the scheme with its options, as an override has them.
        bits_per_weight: of its weight, scales and zero points included.
        nbytes: of its weight.
        kl: what it is predicted to cost, in nats per token.
    """

    fqn: str
    scheme: str
    bits_per_weight: float
    nbytes: int
    kl: float


@dataclass(frozen=True)
class Mixture:
    """The solution for a budget.

    Attributes:
        target: the budget.
        overrides: the user's own, and those that say so.
        rows: every linear that was chosen for, in the model's order.
        bits_per_weight: of all linears that are quantized, those with an override of the user included.
        size_bytes: of the whole file, its header estimated.
        predicted_kl: sum of the rows' predictions, in nats per token.
        table: the sensitivities it was solved from.
        proven: whether no other choice under the budget is predicted to lose less.
        other_algorithm: the sensitivities were measured with another algorithm on the same grids.
    """

    target: Target
    overrides: tuple[Override, ...]
    rows: tuple[MixedRow, ...]
    bits_per_weight: float
    size_bytes: int
    predicted_kl: float
    table: SensitivityTable
    proven: bool
    other_algorithm: bool = False

    def sentence(self) -> str:
        """Say what was found."""
        how = "measured on held-out windows" if self.table.method == "measured" else "predicted from Fisher factors"
        if self.other_algorithm:
            names = dict.fromkeys(each.name for each in self.table.candidates if each.name != WIDE)
            how += f" with {' and '.join(names)}"
        return (
            f"mixed precision under {self.target}: {self.bits_per_weight:.3f} bits per weight, {self.size_bytes:,} bytes, "
            f"KL of about {self.predicted_kl:.2g} nats per token ({how}, linear by linear)"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest: all but the choices, which are its overrides."""
        return {
            "target_bits_per_weight": self.target.bits_per_weight,
            "target_size_bytes": self.target.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "size_bytes": self.size_bytes,
            "predicted_kl": self.predicted_kl,
            "proven": self.proven,
            "method": self.table.method,
            "sensitivity_sha256": self.table.sha256,
            "sensitivity_calibration": self.table.calibration["source_sha256"],
            "held_out": self.table.held_out,
            "other_algorithm": self.other_algorithm,
        }


def solve_mixture(path: str, recipe: Recipe, setup: Setup, table: SensitivityTable, target: Target) -> Mixture:
    """Choose a candidate for every linear, so that the predicted divergences sum to the least that the budget allows.

    Linears that the user's own overrides name keep them, and count.

    Raises:
        UsageError: the budget is below what the smallest candidates take, or the table lacks a linear.
        InputError: the table is of another model.
    """
    checkpoint = open_original(path)
    if table.model_sha256 != checkpoint.sha256:
        raise UsageError(f"the sensitivities are of {table.model}, another model than {path}; measure this one.")
    settled = settle_original(checkpoint, recipe, setup)
    own = own_linears(settled)
    known = {each.fqn: each for each in table.linears}
    missing = sorted(own - known.keys())
    if missing:
        raise UsageError(f"the sensitivities lack {', '.join(missing[:4])}, which the recipe quantizes; measure them again.")
    linears = [each for each in table.linears if each.fqn in own]
    candidates = with_algorithm(table.candidates, settled.resolved)
    options = [_options(candidates, each.shape, each.kl) for each in linears]
    unfit = next((each.fqn for each, found in zip(linears, options, strict=True) if not found), None)
    if unfit is not None:
        raise UsageError(f"no candidate fits {unfit}; name one that does with --candidate, or leave it out with --skip.")
    elsewhere, fixed, elements = _elsewhere(settled, own, setup.torch_dtype)
    elements += sum(math.prod(each.shape) for each in linears)
    budget = _budget(target, elements, fixed, elsewhere)
    least = sum(min(nbytes for nbytes, _, _ in found) for found in options)
    if least > budget:
        raise UsageError(_too_small(target, least, elements, fixed, elsewhere))
    costs = [[nbytes for nbytes, _, _ in found] for found in options]
    answer: Allocation = allocate(costs, [[kl for _, kl, _ in found] for found in options], budget)
    rows, overrides = [], []
    for each, found, choice in zip(linears, options, answer.choices, strict=True):
        nbytes, kl, candidate = found[choice]
        override = Override(each.fqn, candidate.name, candidate.options_json())
        rows.append(MixedRow(each.fqn, str(override).partition("=")[2], 8 * nbytes / math.prod(each.shape), nbytes, kl))
        if candidate != settled.resolved:
            overrides.append(override)
    return Mixture(
        target=target,
        overrides=(*recipe.overrides, *overrides),
        rows=tuple(rows),
        bits_per_weight=8 * (answer.cost + fixed) / elements,
        size_bytes=answer.cost + fixed + elsewhere,
        predicted_kl=answer.loss,
        table=table,
        proven=answer.proven,
        other_algorithm=candidates != table.candidates,
    )


def _options(
    candidates: tuple[ResolvedScheme, ...], shape: tuple[int, int], kl: tuple[float | None, ...]
) -> list[tuple[int, float, ResolvedScheme]]:
    """Return bytes, predicted divergence and scheme of every candidate that fits."""
    n, k = shape
    found = []
    for candidate, value in zip(candidates, kl, strict=True):
        if value is not None:
            found.append((round(n * k * candidate.format.weight.bits_per_weight(k) / 8), value, candidate))
    return found


def _budget(target: Target, elements: int, fixed: int, elsewhere: int) -> int:
    """Return what the linears that are chosen for may take, in bytes."""
    if target.bits_per_weight is not None:
        return math.floor(target.bits_per_weight * elements / 8) - fixed
    assert target.size_bytes is not None
    return target.size_bytes - fixed - elsewhere


def _too_small(target: Target, least: int, elements: int, fixed: int, elsewhere: int) -> str:
    bits, size = 8 * (least + fixed) / elements, least + fixed + elsewhere
    return (
        f"the budget of {target} is too small: the smallest candidates take {bits:.3f} bits per weight, {size:,} bytes with "
        "everything that is not quantized; raise it, or name smaller candidates with --candidate."
    )


def _elsewhere(settled: Settled, own: set[str], dtype: torch.dtype) -> tuple[int, int, int]:
    """Count what is not chosen for.

    Returns:
        Bytes of everything that is not quantized, the file's header included; bytes of linears that the user's overrides
        quantize; and their elements.
    """
    dtypes = {decision.fqn: decision.parameter.dtype for decision in settled.decisions}
    rows = coverage(settled.resolved.name, settled.decisions, dtypes=dtypes, noise={}, compute=dtype).rows
    overridden = [row for row in rows if row.target is not None and row.fqn not in own]
    kept = sum(row.nbytes for row in rows if row.target is None)
    header = sum(3 * (len(row.fqn) + _HEADER_ENTRY) if row.target is not None else len(row.fqn) + _HEADER_ENTRY for row in rows)
    return kept + header, sum(row.nbytes for row in overridden), sum(row.elements for row in overridden)


_HEADER_ENTRY = 96
"""Bytes that a tensor's name, dtype, shape and offsets take in a safetensors header, besides the name of its linear."""
