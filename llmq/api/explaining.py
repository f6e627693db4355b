"""Explaining a quantized model's loss: what each linear contributes, and which few overrides buy most for their bytes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from llmq.algorithms.report import sqnr_db
from llmq.algorithms.statistics import Needs, Statistics
from llmq.api.calibrating import CalibrationSource, calibration_set
from llmq.api.candidates import Candidate, Candidates, settle_candidates
from llmq.api.explained import Explanation, Found, LinearLoss, Pick, Verification, explanation_of
from llmq.api.loading import Loaded, Setup
from llmq.api.original_pair import Pair, check_text, open_pair
from llmq.api.recipes import HEAD, Recipe
from llmq.calibration.corpus import TextSource, resolve_text
from llmq.calibration.partial import changed
from llmq.calibration.recorder import CalibrationSet
from llmq.errors import UsageError
from llmq.evaluation.divergence import CandidateResult, evaluate_candidate
from llmq.evaluation.layer_errors import LinearInputs, Rounding, linear_inputs
from llmq.evaluation.leave_one_out import Change, Measure, Resumed, leave_one_out
from llmq.evaluation.originals import numbers, originals_of, ready, weight_of
from llmq.evaluation.perplexity import plan_evaluation
from llmq.evaluation.protocols import PerplexityProtocol, Window, resolve_protocol
from llmq.evaluation.reference import ReferenceLogits
from llmq.evaluation.scoring import Batching, batches
from llmq.numerics.grid import LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.tensor import QuantizedTensor
from llmq.ops.usage import record_usage
from llmq.progress import SILENT, Progress
from llmq.schemes.apply import quantized_parameter
from llmq.schemes.base import ResolvedScheme
from llmq.schemes.cover import describe_format
from llmq.schemes.overrides import Override, assign_overrides
from llmq.schemes.registry import resolve


@dataclass(frozen=True, slots=True)
class LayersRequest:
    """What is to be explained, and how closely.

    Attributes:
        windows: the first so many of the text.
        top: overrides that are recommended at most; 0: none are looked for.
        text: None: WikiText-2's validation split, else the bundled text.
        length: tokens a window; None: the model's context, at most 2048.
        candidates: 'SCHEME', 'SCHEME:KEY=VALUE,…' or 'original'; none: those of `candidates.settle_candidates`.
        alone: also measure each linear quantized alone.
        calibration: windows that candidates are calibrated with, where they need any and the model was not calibrated now.
    """

    windows: int
    top: int
    text: str | None = None
    length: int | None = None
    candidates: tuple[str, ...] = ()
    alone: bool = False
    calibration: CalibrationSource = field(default_factory=CalibrationSource)


def explain_layers(
    path: str,
    request: LayersRequest,
    recipe: Recipe | None = None,
    setup: Setup | None = None,
    *,
    reference: str | None = None,
    progress: Progress = SILENT,
) -> Explanation:
    """Measure what each quantized linear contributes to a model's loss, and recommend overrides.

    Args:
        path: llmq's artefact, or an original checkpoint that `recipe` is applied to.
        request: text, windows, candidates.
        recipe: a scheme; None: `path` is an artefact.
        setup: where and how both models run; the forward pass is torch's, whatever `runtime` says.
        reference: the original checkpoint; None: `path` itself, where it is one.
        progress: hears of each linear.

    Raises:
        UsageError: see `open_pair`; a candidate cannot be; the text is one that was calibrated on.
        TextError: the text cannot be read, or is too short.
    """
    setup = setup or Setup()
    text = resolve_text(request.text, split="validation")
    if recipe is not None:
        settle_candidates(request.candidates, recipe.resolve())  # refuses before anything is loaded
    pair = open_pair(path, recipe, setup, reference, progress=progress)
    with torch.no_grad():
        return _Work(pair, text, request, progress).run()


class _Work:
    def __init__(self, pair: Pair, text: TextSource, request: LayersRequest, progress: Progress) -> None:
        self.pair, self.text, self.request, self.progress = pair, text, request, progress
        self.model, self.original, self.twin = pair.model.model, pair.original.model, pair.twin.model
        base, overrides = schemes_of(pair.model)
        self.own = dict.fromkeys(pair.linears, base) | assign_overrides(overrides, pair.linears)
        self.candidates = settle_candidates(request.candidates, base) if request.top else Candidates(())
        folded = any(scheme.prepares for scheme in self.own.values())
        self.originals = originals_of(self.model, self.twin, pair.linears, folded=folded)
        self.notes = list(pair.notes)
        if folded:
            self.notes.append(
                "the scheme folds scales of channels into the blocks; those between v and o, up and down are estimated from the "
                "weights, and a linear that is put back has them"
            )
        if self.candidates.note:
            self.notes.append(self.candidates.note)

    def run(self) -> Explanation:
        calibration = self._calibration()
        first, both, evaluated = self._protocols()
        self.notes += check_text(self.pair.model, calibration, self.text, evaluated)
        with self._reference(first) as reference:
            measure = self._measure(reference)
            reference.perplexity(progress=self.progress)
            if not reference.storage.kept:
                self.progress.note(reference.storage.reason)
            with record_usage() as usage:
                before = measure(self.model)
            put_back: dict[str, Callable[[], nn.Parameter]] = {fqn: each.put_back for fqn, each in self.originals.items()}
            costs = leave_one_out(self.model, before, put_back, measure, reference.batches, progress=self.progress)
            alone = self._alone(measure, reference)
            linears, picks = self._walk(reference, calibration, costs, alone)
            verification = self._verify(picks, before, measure, (first.limit or 0, both)) if picks else None
        measured = (before, linears, picks, verification)
        sought = self.request.top > 0
        return explanation_of(Found(self.pair.model, self.pair.original, *measured, usage.linears(), self.notes, sought))

    def _protocols(self) -> tuple[PerplexityProtocol, PerplexityProtocol, str]:
        """Return the protocol that losses are measured by, and the one with as many windows again, and all of them as text."""
        windows, context = self.request.windows, self.model.config.max_position_embeddings
        both = resolve_protocol("windows", {"length": self.request.length, "limit": 2 * windows}, context=context)
        tokenizer = self.pair.model.tokenizer
        found = plan_evaluation(tokenizer, self.text, both).windows
        first = both.model_copy(update={"limit": min(windows, len(found))})
        evaluated = "\n".join(tokenizer.decode(window.inputs.tolist()) for window in found)
        return first, both.model_copy(update={"limit": len(found)}), evaluated

    def _reference(self, protocol: PerplexityProtocol, skip: int = 0) -> ReferenceLogits:
        return ReferenceLogits(self.original, self.pair.model.tokenizer, self.text, protocol, skip=skip)

    def _measure(self, reference: ReferenceLogits) -> Measure:
        protocol, tokenizer = reference.plan.protocol, self.pair.model.tokenizer
        return partial(evaluate_candidate, tokenizer=tokenizer, text=self.text, protocol=protocol, reference=reference)

    def _calibration(self) -> CalibrationSet | None:
        """Return the windows that candidates are calibrated with; None where none needs them."""
        if not self.candidates.needs_calibration:
            return None
        loaded = self.pair.model
        if loaded.calibration is not None:
            return loaded.calibration
        seed, source = loaded.setup.seed, self.request.calibration
        return calibration_set(loaded.tokenizer, self.model.config, source, seed=seed, progress=self.progress)

    def _alone(self, measure: Measure, reference: ReferenceLogits) -> dict[str, Change]:
        """Measure what the original loses more with one linear quantized."""
        if not self.request.alone:
            return {}
        if any(each.divided is not None for each in self.originals.values()):
            raise UsageError(
                "--alone puts a quantized linear into the original, and this scheme folded scales into it; leave it out."
            )
        weights: dict[str, Callable[[], nn.Parameter]] = {fqn: partial(weight_of, self.model, fqn) for fqn in self.pair.linears}
        found = leave_one_out(self.original, measure(self.original), weights, measure, reference.batches, progress=self.progress)
        return {fqn: change.times(-1) for fqn, change in found.items()}

    def _walk(
        self,
        reference: ReferenceLogits,
        calibration: CalibrationSet | None,
        costs: dict[str, Change],
        alone: dict[str, Change],
    ) -> tuple[tuple[LinearLoss, ...], tuple[Pick, ...]]:
        """Look at each linear's weight, and at what candidates would make of it."""
        other = None if calibration is None else Resumed(self.twin, _batches(calibration))
        linears: list[LinearLoss] = []
        picks: list[Pick] = []
        walk = linear_inputs(Resumed(self.twin, reference.batches), other, self.originals, self._roundings)
        with self.progress.task("errors and candidates", len(self.originals)) as advance:
            for fqn, inputs in walk:
                quantized = _quantized(self.model, fqn)
                weight, now = self.originals[fqn].weight, numbers(quantized)
                linear = LinearLoss(
                    fqn=fqn,
                    shape=(weight.shape[0], weight.shape[1]),
                    format=describe_format(quantized.format),
                    nbytes=quantized.format.nbytes(*weight.shape),
                    sqnr_db=sqnr_db(weight, now),
                    error=inputs.error(weight, now, quantized.format),
                    cost=costs[fqn],
                    alone=alone.get(fqn),
                )
                linears.append(linear)
                best = self._best(linear, inputs)
                if best is not None:  # those that are not among the best let go of their weights at once
                    picks = sorted([*picks, best], key=lambda pick: pick.rank, reverse=True)[: self.request.top]
                advance(1)
        return tuple(linears), tuple(picks)

    def _roundings(self, fqn: str) -> list[Rounding]:
        """Return how the inputs of a linear are rounded, now or by candidates."""
        quantized = _quantized(self.model, fqn)
        grid = quantized.format.activation
        found: list[Rounding] = [] if grid is None else [(grid, quantized.weight.input_scale)]
        for candidate in self.candidates.each:
            other = candidate.format(self.model.dtype).activation
            if other is not None and all(other != known for known, _ in found):
                found.append((other, None))
        return found

    def _best(self, linear: LinearLoss, inputs: LinearInputs) -> Pick | None:
        """Return the candidate that buys most for its bytes; None where the linear's cost is not certain, or none helps."""
        if not linear.cost.certain or linear.error.total <= 0:
            return None
        original, dtype = self.originals[linear.fqn], self.model.dtype
        weight = original.weight
        best: Pick | None = None
        for candidate in self.candidates.each:
            form = candidate.format(dtype)
            extra = self._bytes(linear, candidate, form) - linear.nbytes if form.weight.misfit(*linear.shape) is None else None
            if extra is None or candidate.scheme == self.own[linear.fqn] or (extra <= 0 and not self.candidates.named):
                continue
            if candidate.scheme is None:
                left, make = 0.0, original.put_back
            else:
                quantized = _round(candidate.scheme, weight, inputs, linear.fqn)
                left = inputs.error(weight, quantized.dequantize(), form).total / linear.error.total
                make = partial(_laid_out, quantized, form, dtype)
            pick = Pick(linear.fqn, candidate, extra, left, linear.cost.times(1 - left), make)
            if left < 1 and (best is None or pick.rank > best.rank):
                best = pick
        return best

    def _bytes(self, linear: LinearLoss, candidate: Candidate, form: LinearFormat) -> int:
        """Return what a linear would take; a head that is the embedding again takes nothing of its own."""
        tied = self.original.config.tie_word_embeddings and linear.fqn == HEAD and candidate.scheme is None
        return 0 if tied else form.nbytes(*linear.shape)

    def _verify(
        self, picks: tuple[Pick, ...], before: CandidateResult, measure: Measure, fresh: tuple[int, PerplexityProtocol]
    ) -> Verification:
        """Measure all picks together, on the windows that they were chosen by and on those that come after them."""
        predicted = picks[0].predicted
        for pick in picks[1:]:
            predicted = predicted.plus(pick.predicted)
        skip, both = fresh
        again = both.limit is not None and both.limit > skip
        with self.progress.task("all picks together", 3 if again else 1) as advance, ExitStack() as stack:
            if again:
                reference = stack.enter_context(self._reference(both, skip))
                on_fresh = self._measure(reference)
                before_fresh = on_fresh(self.model)
                advance(1)
            else:
                self.notes.append("the text has no further windows to measure the picks on")
            for pick in picks:
                linear = self.model.get_submodule(pick.fqn)
                assert isinstance(linear, nn.Linear)
                stack.enter_context(changed(linear, pick.make()))
            measured = Change.between(before, measure(self.model))
            advance(1)
            after_fresh = Change.between(before_fresh, on_fresh(self.model)) if again else None
        return Verification(predicted, measured, after_fresh)


def schemes_of(loaded: Loaded) -> tuple[ResolvedScheme, tuple[Override, ...]]:
    """Return the scheme of a quantized model and what overrides it, from how it was quantized or from its manifest."""
    if loaded.resolved is not None:
        return loaded.resolved, loaded.overrides
    manifest = loaded.checkpoint.manifest
    assert manifest is not None
    return resolve(manifest.scheme, manifest.options), tuple(Override(**data) for data in manifest.overrides)


def _quantized(model: nn.Module, fqn: str) -> QuantizedTensor:
    weight = weight_of(model, fqn)
    assert isinstance(weight, QuantizedTensor)
    return weight


def _round(scheme: ResolvedScheme, weight: torch.Tensor, inputs: LinearInputs, fqn: str) -> QuantizedWeight:
    """Quantize one weight by a candidate's own algorithm, for the inputs that the original gives it."""
    statistics = None
    if scheme.needs_calibration:
        assert inputs.calibration is not None
        upstream = torch.zeros_like(inputs.calibration) if Needs.UPSTREAM in scheme.needs else None
        statistics = Statistics(inputs.calibration, upstream)
    quantized, _ = scheme.quantize_weight(weight, statistics, fqn)
    return quantized


def _laid_out(quantized: QuantizedWeight, form: LinearFormat, dtype: torch.dtype) -> nn.Parameter:
    return ready(quantized_parameter(quantized, form, dtype))


def _batches(calibration: CalibrationSet) -> list[list[Window]]:
    """Return calibration windows as batches to run; nothing of them is scored."""
    windows = [Window(tokens.long(), tokens[1:].long(), 0) for tokens in calibration.tokens]
    return list(batches(windows, Batching()))
