"""Sensitivities of a checkpoint's linears: which schemes are compared, and what each would cost the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

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
from llmq.progress import SILENT, Progress
from llmq.schemes.base import ResolvedScheme
from llmq.schemes.overrides import Override
from llmq.schemes.registry import resolve, scheme_names

HELD_OUT = 8
"""Windows that divergences are measured on where no number is asked for."""
GROUPS = (32, 64, 128)
BITS = (3, 4)
WIDE = "int8-weight-only"
"""The candidate for linears that must not lose anything."""

_FAMILY = re.compile(r"int([0-9])(-.+)?")
_GRID_OPTIONS = ("group_size", "symmetric", "zero_point", "mapping")


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
            if not candidate.format.quantized:
                raise UsageError(f"candidate {text} quantizes nothing; leave linears unquantized with --skip.")
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
    family = _family_of(base)
    if family is None:
        raise UsageError(f"scheme {base.name} has no groups to choose from; name candidates with --candidate.")
    found = []
    for name in (f"int{bits}{family[2] or ''}" for bits in BITS):
        if name in scheme_names():
            known = type(resolve(name).options).model_fields
            options = {key: value for key, value in base.options_json().items() if key in known}
            found += [resolve(name, {**options, "group_size": size}) for size in GROUPS]
    if not found:
        raise UsageError(
            f"scheme {base.name} has no relatives of {' or '.join(map(str, BITS))} bits; name candidates with --candidate."
        )
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
    checkpoint = open_original(path)
    candidates = request.resolve(recipe.resolve())
    method = request.settle_method(needs_factors=any(Needs.FISHER in each.needs for each in (recipe.resolve(), *candidates)))
    settled = settle_original(checkpoint, recipe, setup)
    own = own_linears(settled)
    held_out = request.held_out if method == "measured" else 0
    tokenizer = load_tokenizer_for(checkpoint)
    calibration = calibration_set(tokenizer, checkpoint.config, recipe.calibration, seed=setup.seed, progress=progress)
    kept = len(calibration.tokens) - held_out
    if kept < 1:
        raise UsageError(
            f"{len(calibration.tokens)} calibration windows are too few to keep {held_out} of them back; ask for more windows."
        )
    tokens = calibration.tokens[:kept]
    model = load_model(checkpoint, dtype=torch.float32, device=setup.device, progress=progress)
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
    return SensitivityTable.load(file, model_sha256=open_original(path).sha256)


def with_algorithm(candidates: tuple[ResolvedScheme, ...], base: ResolvedScheme) -> tuple[ResolvedScheme, ...]:
    """Return the schemes that the choices stand for.

    Where no candidate has the algorithm of the base scheme (int4 was measured, and int4-gptq is to be applied), each integer
    grid in groups becomes the base's algorithm on the same grid.
    """
    suffixes = {found[2] for found in map(_family_of, candidates) if found is not None}
    own = _family_of(base)
    if own is None or own[2] in suffixes:
        return candidates
    return tuple(_on_grid_of(candidate, base, own[2]) for candidate in candidates)


def _on_grid_of(candidate: ResolvedScheme, base: ResolvedScheme, suffix: str | None) -> ResolvedScheme:
    family = _family_of(candidate)
    name = f"int{family[1]}{suffix or ''}" if family is not None else ""
    if name not in scheme_names():
        return candidate
    grid = {key: value for key, value in candidate.options_json().items() if key in _GRID_OPTIONS}
    rest = {key: value for key, value in base.options_json().items() if key not in _GRID_OPTIONS}
    return resolve(name, {**rest, **grid})


def has_relatives(scheme: ResolvedScheme) -> bool:
    """Whether there are schemes of other bits by the same algorithm, among which `default_candidates` can choose."""
    family = _family_of(scheme)
    return family is not None and any(f"int{bits}{family[2] or ''}" in scheme_names() for bits in BITS)


def _family_of(scheme: ResolvedScheme) -> re.Match[str] | None:
    """Match the name of a scheme on integers in groups: its bits, and the algorithm with a dash before it."""
    return _FAMILY.fullmatch(scheme.name) if "group_size" in type(scheme.options).model_fields else None


def own_linears(settled: Settled) -> set[str]:
    """Return the linears that the recipe's own scheme quantizes: those that are chosen for."""
    return {
        decision.fqn
        for decision in settled.decisions
        if decision.scheme is not None
        and decision.format is not None
        and decision.format.quantized
        and decision.fqn not in settled.overrides
    }


def settle_original(checkpoint: Checkpoint, recipe: Recipe, setup: Setup) -> Settled:
    """Decide what a recipe means for every parameter of a checkpoint, without reading any."""
    with torch.device("meta"):
        model = Llama(checkpoint.config).to(checkpoint.dtype)
    return settle(recipe, model, setup.torch_dtype)


def open_original(path: str) -> Checkpoint:
    """Open a checkpoint; raises UsageError when it is quantized already."""
    checkpoint = open_checkpoint(path)
    if checkpoint.manifest is not None:
        raise UsageError(f"{path} is quantized already (scheme {checkpoint.manifest.scheme}); name the original checkpoint.")
    return checkpoint


def checkpoint_name(checkpoint: Checkpoint) -> str:
    """Return the name of a checkpoint's folder or file."""
    return checkpoint.path.resolve().name
