"""Mixed precision: a scheme for each linear, so that the model loses least under a budget of bits or bytes.

What each linear loses under each candidate is measured once (`measure_sensitivity`) and kept; a budget is then solved in well
under a second (`solve_mixture`), exactly, and the answer is a list of overrides.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from llmq.algorithms.allocate import Allocation, allocate
from llmq.algorithms.statistics import Needs
from llmq.api.calibrating import calibration_set
from llmq.api.loading import Setup
from llmq.api.recipes import Recipe, Settled, linear_fqns, settle
from llmq.calibration.factors import FactorFiles
from llmq.calibration.fisher import FisherSettings, fisher_factors
from llmq.calibration.sensitivity import METHODS, Method, sensitivities
from llmq.calibration.sensitivity import Question as SensitivityQuestion
from llmq.calibration.sensitivity_file import SensitivityTable
from llmq.checkpoint import Checkpoint, load_model, load_tokenizer_for, open_checkpoint
from llmq.errors import UsageError, suggest
from llmq.model.llama import Llama
from llmq.numerics.grid import IntGrid
from llmq.progress import SILENT, Progress
from llmq.schemes.base import ResolvedScheme
from llmq.schemes.cover import coverage
from llmq.schemes.overrides import Override
from llmq.schemes.registry import resolve, scheme_names

HELD_OUT = 8
"""Windows that divergences are measured on where no number is asked for."""
GROUPS = (32, 64, 128)
BITS = (3, 4)
WIDE = "int8-weight-only"
"""The candidate for linears that must not lose anything."""

_FAMILY = re.compile(r"int[0-9](-.+)?")
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
class SensitivityRequest:
    """What is to be measured.

    Attributes:
        candidates: 'SCHEME' or 'SCHEME:KEY=VALUE,KEY=VALUE'; none: those of `default_candidates`.
        method: one of `METHODS`; None: 'fisher' where the scheme needs Fisher factors anyway, else 'measured'.
        held_out: windows that divergences are measured on; they are recorded beside those of the calibration.
    """

    candidates: tuple[str, ...] = ()
    method: str | None = None
    held_out: int = HELD_OUT

    def resolve(self, base: ResolvedScheme) -> tuple[ResolvedScheme, ...]:
        """Settle the candidates; raises UsageError for one that cannot be."""
        if not self.candidates:
            return default_candidates(base)
        found = tuple(Override.parse(f"*={text}").resolve() for text in self.candidates)
        for text, candidate in zip(self.candidates, found, strict=True):
            if not isinstance(candidate.format.weight, IntGrid):
                raise UsageError(f"candidate {text} has no integer grid; leave linears unquantized with --skip.")
            if found.count(candidate) > 1:
                raise UsageError(f"candidate {text} is named twice; name it once.")
        return found

    def settle_method(self, *, needs_factors: bool) -> Method:
        """Return the method; raises UsageError for one that there is not."""
        if self.method is None:
            return "fisher" if needs_factors else "measured"
        for name in METHODS:
            if name == self.method:
                return name
        raise UsageError(f"unknown method {self.method!r}.{suggest(self.method, list(METHODS))}")


def default_candidates(base: ResolvedScheme) -> tuple[ResolvedScheme, ...]:
    """Return the base scheme with 3 and 4 bits in groups of 32, 64 and 128, as far as there are such schemes, and int8.

    Raises:
        UsageError: the scheme is of no such family.
    """
    if not _FAMILY.fullmatch(base.name) or "group_size" not in type(base.options).model_fields:
        raise UsageError(f"scheme {base.name} has no groups to choose from; name candidates with --candidate.")
    suffix = base.name[4:]
    found = []
    for name in (f"int{bits}{suffix}" for bits in BITS):
        if name in scheme_names():
            known = type(resolve(name).options).model_fields
            options = {key: value for key, value in base.options_json().items() if key in known}
            found += [resolve(name, {**options, "group_size": size}) for size in GROUPS]
    return (*found, resolve(WIDE))


def measure_sensitivity(
    path: str, recipe: Recipe, setup: Setup, request: SensitivityRequest, *, progress: Progress = SILENT
) -> SensitivityTable:
    """Predict what every linear that the recipe quantizes would cost the model under each candidate.

    Raises:
        InputError: the checkpoint, tokenizer or calibration text cannot be used.
        UsageError: the scheme, a candidate or the method cannot be.
    """
    setup.apply()
    checkpoint = _original(path)
    candidates = request.resolve(recipe.resolve())
    method = request.settle_method(needs_factors=any(Needs.FISHER in each.needs for each in (recipe.resolve(), *candidates)))
    settled = _settle(checkpoint, recipe, setup)
    own = _own(settled)
    held_out = request.held_out if method == "measured" else 0
    tokenizer = load_tokenizer_for(checkpoint)
    calibration = calibration_set(tokenizer, checkpoint.config, recipe.calibration, seed=setup.seed, progress=progress)
    kept = len(calibration.tokens) - held_out
    if kept < 1:
        raise UsageError(
            f"{len(calibration.tokens)} calibration windows are too few to keep {held_out} of them back; ask for more windows."
        )
    tokens = calibration.tokens[:kept]
    model = load_model(checkpoint, dtype=torch.float32, progress=progress)
    with TemporaryDirectory() as folder:
        factors = FactorFiles(Path(folder))
        question = SensitivityQuestion(candidates, method, factors, frozenset(linear_fqns(model)) - own)
        if question.needs_factors:
            rounds = max([candidate.fisher_rounds for candidate in candidates if Needs.FISHER in candidate.needs], default=1)
            fisher = FisherSettings(rounds=rounds, seed=setup.seed)
            fisher_factors(model, tokens, own, factors.write, settings=fisher, progress=progress)
        found = sensitivities(model, tokens, calibration.tokens[kept:], question, progress=progress)
    return SensitivityTable(
        model=checkpoint_name(checkpoint),
        model_sha256=checkpoint.sha256,
        method=method,
        calibration=calibration.info.to_json(),
        held_out=held_out,
        threads=torch.get_num_threads(),
        candidates=candidates,
        linears=tuple(found),
    )


def read_sensitivity(path: str, file: Path) -> SensitivityTable:
    """Read a file of sensitivities of the checkpoint at `path`; raises InputError when it is of another one."""
    return SensitivityTable.load(file, model_sha256=_original(path).sha256)


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
    """

    target: Target
    overrides: tuple[Override, ...]
    rows: tuple[MixedRow, ...]
    bits_per_weight: float
    size_bytes: int
    predicted_kl: float
    table: SensitivityTable
    proven: bool

    def sentence(self) -> str:
        """Say what was found."""
        how = "measured on held-out windows" if self.table.method == "measured" else "predicted from Fisher factors"
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
        }


def solve_mixture(path: str, recipe: Recipe, setup: Setup, table: SensitivityTable, target: Target) -> Mixture:
    """Choose a candidate for every linear, so that the predicted divergences sum to the least that the budget allows.

    Linears that the user's own overrides name keep them, and count.

    Raises:
        UsageError: the budget is below what the smallest candidates take, or the table lacks a linear.
        InputError: the table is of another model.
    """
    checkpoint = _original(path)
    if table.model_sha256 != checkpoint.sha256:
        raise UsageError(f"the sensitivities are of {table.model}, another model than {path}; measure this one.")
    settled = _settle(checkpoint, recipe, setup)
    own = _own(settled)
    known = {each.fqn: each for each in table.linears}
    missing = sorted(own - known.keys())
    if missing:
        raise UsageError(f"the sensitivities lack {', '.join(missing[:4])}, which the recipe quantizes; measure them again.")
    linears = [each for each in table.linears if each.fqn in own]
    options = [_options(table.candidates, each.shape, each.kl) for each in linears]
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


def _own(settled: Settled) -> set[str]:
    """Return the linears that the recipe's own scheme quantizes: those that are chosen for."""
    return {
        decision.fqn
        for decision in settled.decisions
        if decision.scheme is not None
        and decision.format is not None
        and isinstance(decision.format.weight, IntGrid)
        and decision.fqn not in settled.overrides
    }


def _settle(checkpoint: Checkpoint, recipe: Recipe, setup: Setup) -> Settled:
    with torch.device("meta"):
        model = Llama(checkpoint.config).to(checkpoint.dtype)
    return settle(recipe, model, setup.torch_dtype)


def _original(path: str) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    if checkpoint.manifest is not None:
        raise UsageError(f"{path} is quantized already (scheme {checkpoint.manifest.scheme}); name the original checkpoint.")
    return checkpoint


def checkpoint_name(checkpoint: Checkpoint) -> str:
    """Return the name of a checkpoint's folder or file."""
    return checkpoint.path.resolve().name
