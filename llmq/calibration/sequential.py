"""Quantize a model block by block, each block for the inputs that the quantized blocks before it produce.

    windows -> embed -> h                                       all windows, bf16 unless asked otherwise
    for each block, on a copy of it in fp32:
        h through the block, as it still is                     -> second moments for each group of linears of one input
        each linear's weight and its statistics                 -> codes; the copy goes on with the numbers they mean
        h through the block, as it is now                       -> h for the next block

Where a scheme asks for it, the original model's hidden states go through the original blocks beside h. At any time there are
one block's fp32 copy, its moments, and the hidden states. A `Keeper` brings each part's parameters and takes its final ones;
what it says was finished by an earlier run is only run through, which gives the next block the same h, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmq.algorithms.folding import folded_scales
from llmq.algorithms.products import narrow_passes
from llmq.algorithms.report import LayerReport
from llmq.algorithms.statistics import Needs, Statistics
from llmq.calibration.activations import Activations, Spill, activation_dtype, brought
from llmq.calibration.embedded import check_tokens, embed_windows
from llmq.calibration.factors import FactorMemory, Factors, gather_factors
from llmq.calibration.fisher import FisherSettings
from llmq.calibration.gather import Moments, find_groups, gather
from llmq.calibration.recorder import CalibrationSet
from llmq.calibration.sharing import quantize_linears, refuse_shared
from llmq.calibration.stages import BlockModel, InMemory, Keeper, Stage, block_model, stages_of
from llmq.errors import SchemeError
from llmq.files import trim_heap
from llmq.numerics.grid import format_from_json
from llmq.numerics.weight import QuantizedWeight
from llmq.progress import SILENT, Progress
from llmq.ranks import Ranks
from llmq.results.coverage import Coverage
from llmq.schemes.apply import NO_OVERRIDES, decide, plain_weight, quantized_parameter, wrap_floats_
from llmq.schemes.base import ResolvedScheme
from llmq.schemes.block import EMBEDDING, BlockWork
from llmq.schemes.cover import Decision, as_done, coverage, describe_format


@dataclass(frozen=True)
class WalkSettings:
    """How the walk runs, beside what the schemes decide.

    Attributes:
        activations: dtype of the hidden states between blocks: 'bf16' or 'fp32'. With bf16, blocks compute in it too
            where that is faster (`algorithms.products`) and the schemes take it.
        spill: where they lie.
        factors: where Fisher factors are, for schemes that need them.
        ranks: the processes that share the windows and the linears.
    """

    activations: str = "bf16"
    spill: Spill = None
    factors: Factors | None = None
    ranks: Ranks = field(default_factory=Ranks)


def quantize_sequential(  # noqa: PLR0913 - what to apply, where, and how
    model: nn.Module,
    resolved: ResolvedScheme,
    calibration: CalibrationSet,
    *,
    skip: Sequence[str] = (),
    skip_unfit: bool = False,
    overrides: Mapping[str, ResolvedScheme] = NO_OVERRIDES,
    settings: WalkSettings | None = None,
    progress: Progress = SILENT,
) -> tuple[Coverage, list[LayerReport]]:
    """Quantize a model in memory, in place, block by block, propagating quantized inputs.

    What can be checked is checked first. Where an activation turns out not to be finite, the blocks before it are quantized
    already: load the model again.

    Args:
        model: a `BlockModel`, in the dtype it is to compute in.
        resolved: a scheme. One that needs no statistics gives what `quantize_` gives, only slower.
        calibration: token windows.
        skip: see `schemes.apply.quantize_`.
        skip_unfit: see `schemes.apply.quantize_`.
        overrides: see `schemes.apply.quantize_`.
        settings: see `WalkSettings`.
        progress: see `Walk.run`.

    Returns:
        What was done to every parameter, and a report for each quantized linear, in the order in which they were done.

    Raises:
        ShapeError: linears do not fit the grid.
        SchemeError: activations are not finite, or a linear is not called by its block or the head.
        TextError: the windows hold tokens that the model does not have.
        UsageError: a pattern matches no linear, the windows are longer than the context, or the model is no `BlockModel`.
    """
    block_model(model)
    decisions = decide(model, resolved, skip=skip, skip_unfit=skip_unfit, overrides=overrides)
    dtypes = {decision.fqn: decision.parameter.dtype for decision in decisions}
    settings = settings or WalkSettings()
    factors = settings.factors or FactorMemory()
    fisher = FisherSettings(activations=settings.activations, spill=settings.spill, ranks=settings.ranks)
    gather_factors(model, decisions, calibration, factors, keeper=InMemory(), settings=fisher, progress=progress)
    settings = replace(settings, factors=factors)
    reports = Walk(model, decisions, calibration, settings=settings).run(progress=progress)
    noise = {report.fqn: report.sqnr_db for report in reports}
    return coverage(resolved.name, as_done(decisions, reports), dtypes=dtypes, noise=noise, compute=None), reports


class Walk:
    """One walk through a model.

    Attributes:
        model: see `quantize_sequential`; its parameters may be on the meta device where the keeper opens them.
        decisions: what is to become of every parameter.
        calibration: token windows; None where no scheme needs any: then nothing is run.
        keeper: who has the parameters.
        settings: how it runs.
    """

    def __init__(
        self,
        model: nn.Module,
        decisions: Sequence[Decision],
        calibration: CalibrationSet | None,
        *,
        keeper: Keeper | None = None,
        settings: WalkSettings | None = None,
    ) -> None:
        self.model: BlockModel = block_model(model)
        self.calibration, self.keeper, self.settings = calibration, keeper or InMemory(), settings or WalkSettings()
        self.stages = stages_of(self.model, decisions)
        self.needs = _joined(decision for stage in self.stages for decision in stage.targets.values())
        self._onward = _before_targets(self.stages)
        self._narrow = self.settings.activations == "bf16" and all(map(_takes_narrow_passes, decisions))
        if calibration is not None:
            check_tokens(model, calibration.tokens)
        refuse_shared((decision for stage in self.stages for decision in stage.targets.values()), self.settings.ranks)
        self._q: Activations | None = None
        self._f: Activations | None = None
        self._context: Any = None
        self._folded: dict[str, tuple[Tensor, Tensor]] = {}

    def run(self, *, progress: Progress = SILENT) -> list[LayerReport]:
        """Quantize all stages.

        Args:
            progress: hears of three steps for each window and stage, and of every fallback.

        Returns:
            A report for each quantized linear, in the order in which they were done.
        """
        n = len(self._share()) if self.calibration is not None else 1
        reports: list[LayerReport] = []
        names = list(dict.fromkeys(d.scheme.name for stage in self.stages for d in stage.targets.values() if d.scheme))
        with torch.no_grad(), progress.task(f"{', '.join(names) or 'copying'}, block by block", 3 * n * len(self.stages)) as go:
            with self.settings.ranks.together():
                self._embed()
            if self.keeper.finished(EMBEDDING) is None:
                self.keeper.close(EMBEDDING, [])
            else:
                self.keeper.leave(EMBEDDING)
            for stage in self.stages:
                done = self.keeper.finished(stage.name)
                reports += self._again(stage, done, go, n) if done is not None else self._first_time(stage, go, n)
        for report in reports:
            if report.fallback is not None:
                progress.note(f"{report.fqn} was rounded to nearest: {report.fallback}")
            if report.format is not None:
                progress.note(f"{report.fqn} became {describe_format(format_from_json(report.format))}")
        return reports

    def _share(self) -> range:
        assert self.calibration is not None
        return self.settings.ranks.share(len(self.calibration.tokens))

    def _embed(self) -> None:
        """Fill the hidden states with the embedded windows of this process."""
        self.keeper.open(EMBEDDING)
        if self.calibration is not None:
            share = self._share()
            windows = self.calibration.tokens[share.start : share.stop]
            dtype = activation_dtype(self.settings.activations)
            self._q, self._context = embed_windows(self.model, windows, dtype, spill=self.settings.spill)
            if self.needs & (Needs.UPSTREAM | Needs.TARGETS):
                self._f = self._q.like(spill=self.settings.spill)

    def _again(self, stage: Stage, done: list[LayerReport], go: Callable[[int], None], n: int) -> list[LayerReport]:
        """Run the windows through a stage that was finished before."""
        if self._q is not None and stage.name in self._onward:
            if self._f is not None:
                self.keeper.open(stage.name)
                self._propagate(stage, stage.float_copy(), self._f, lambda _: None)
                self.keeper.leave(stage.name)
            self.keeper.restore(stage.name)
            self._propagate(stage, stage.float_copy(), self._q, go)
            self.keeper.leave(stage.name)
            go(2 * n)
        else:
            go(3 * n)
        return done

    def _first_time(self, stage: Stage, go: Callable[[int], None], n: int) -> list[LayerReport]:
        """Quantize a stage, close it, and run the windows through what it has become."""
        seen = self._q is not None and not (stage.is_head and not stage.targets)
        with self.settings.ranks.together():
            self.keeper.open(stage.name)
            block, moments = self._see(stage, stage.float_copy(), go) if seen else (self._block_work(stage, stage.module, []), {})
        if not seen:
            go(2 * n if stage.targets else 3 * n)
        reports = self._quantize(stage, block, moments, go, n) if seen or stage.targets else []
        wrap_floats_([decision for decision in stage.decisions if decision.format is not None])
        if self._q is not None and stage.name in self._onward:
            self._propagate(stage, stage.float_copy(), self._q, go)  # from what is stored, as a resumed run has it
        elif seen:
            go(n)
        self.keeper.close(stage.name, reports)
        trim_heap()
        return reports

    def _see(self, stage: Stage, work: nn.Module, go: Callable[[int], None]) -> tuple[BlockWork, dict[str, Moments]]:
        """Run the windows of this process through a stage; return it with the moments that its linears need."""
        assert self._q is not None
        targets = list(stage.targets.values())
        needs = _joined(targets)
        linears = {
            name: module for name, module in work.named_modules() if name in stage.targets and isinstance(module, nn.Linear)
        }
        run = partial(self._forward, stage, work)
        groups = find_groups(linears, run, self._q.batches[0][:1]) if linears else []
        silent = [stage.targets[name].fqn for name in linears if not any(name in group for group in groups)]
        if silent:
            raise SchemeError(
                f"{', '.join(silent)} did not run when the model did, so nothing is known of the inputs; use --skip."
            )
        f, pairs = self._f, self._f
        prepared = not stage.is_head and any(d.scheme is not None and d.scheme.prepares for d in targets)
        if f is not None and not stage.is_head and (prepared or Needs.UPSTREAM not in needs):
            # the original's states go on now, through weights that nobody has folded anything into yet
            pairs = f.like(spill=self.settings.spill) if Needs.UPSTREAM in needs else None
            self._propagate(stage, work, f, lambda _: None)
        block = self._block_work(stage, work, groups)
        if prepared:
            self._prepare(stage, block)
        moments = {
            group[0]: Moments(_joined(stage.targets[name] for name in group))
            for group in groups
            if _joined(stage.targets[name] for name in group) & (Needs.INPUTS | Needs.UPSTREAM)
        }
        originals = pairs.batches if pairs is not None else [None] * len(self._q.batches)
        going_on = f.batches if f is not None and pairs is f and stage.name in self._onward else None
        gather(linears, moments, run, list(zip(self._q.batches, originals, strict=True)), go, going_on)
        return block, moments

    def _quantize(
        self, stage: Stage, block: BlockWork, moments: dict[str, Moments], go: Callable[[int], None], n: int
    ) -> list[LayerReport]:
        """Choose the codes of every linear of a stage, and put them into the model."""
        groups = block.groups or [[name] for name in stage.targets]
        names = [name for group in groups for name in group]
        ordered, reports = quantize_linears(
            block.linears, groups, stage.targets, moments, self._quantize_one, self.settings.ranks
        )
        if not stage.is_head:
            ordered = self._tune(stage, block, ordered, reports)
        for index, name in enumerate(names):
            decision = stage.targets[name]
            assert decision.linear is not None
            assert decision.scheme is not None
            dtype = plain_weight(decision.linear.weight).dtype
            form = decision.scheme.scheme.format_of(ordered[name], decision.scheme.options)
            if form != decision.format:
                reports[name] = replace(reports[name], format=form.to_json())
            decision.linear.weight = quantized_parameter(ordered[name], form, dtype)
            go(n * (index + 1) // len(names) - n * index // len(names))
        if not names:
            go(n)
        return [reports[name] for name in names]

    def _quantize_one(
        self, decision: Decision, weight: Tensor, hessian: Tensor | None, upstream: Tensor | None
    ) -> tuple[QuantizedWeight, LayerReport]:
        assert decision.scheme is not None
        return decision.scheme.quantize_weight(weight, self._statistics(decision, hessian, upstream), decision.fqn)

    def _statistics(self, decision: Decision, hessian: Tensor | None, upstream: Tensor | None) -> Statistics | None:
        if hessian is None:
            return None
        if decision.scheme is None or Needs.FISHER not in decision.scheme.needs:
            return Statistics(hessian, upstream)
        return Statistics(hessian, upstream, *self._fisher(decision))

    def _fisher(self, decision: Decision) -> tuple[Tensor, Tensor]:
        """Return the factors of a linear as it is after scales were folded into its block."""
        if self.settings.factors is None:
            raise SchemeError(f"the Fisher factors of {decision.fqn} are needed; give the walk `factors`.")
        assert decision.linear is not None
        inputs, outputs = (each.to(decision.linear.weight.device) for each in self.settings.factors.read(decision.fqn))
        if decision.fqn in self._folded:  # factors are of the original: x is divided by what columns are multiplied by
            columns, rows = self._folded[decision.fqn]
            inputs, outputs = inputs / columns[:, None] / columns, outputs * rows[:, None] * rows
        return inputs, outputs

    def _prepare(self, stage: Stage, block: BlockWork) -> None:
        """Let each scheme change the block's float weights; norms that changed go into the model."""
        for part, scheme in _by_scheme(stage, block):
            scheme.scheme.prepare_block(part, scheme.options)
        own = dict(stage.module.named_parameters())
        for name, decision in stage.targets.items():
            if decision.scheme is not None and Needs.FISHER in decision.scheme.needs:
                before, after = plain_weight(own[f"{name}.weight"]).float(), block.linears[name].weight
                self._folded[decision.fqn] = folded_scales(before, after)
        for name, parameter in block.module.named_parameters():
            if name.removesuffix(".weight") not in stage.targets and not torch.equal(parameter, plain_weight(own[name]).float()):
                owner, _, leaf = name.rpartition(".")
                stored = parameter.detach().to(plain_weight(own[name]).dtype)
                setattr(stage.module.get_submodule(owner), leaf, nn.Parameter(stored, requires_grad=False))

    def _tune(
        self, stage: Stage, block: BlockWork, weights: dict[str, QuantizedWeight], reports: dict[str, LayerReport]
    ) -> dict[str, QuantizedWeight]:
        tuned = dict(weights)
        for part, scheme in _by_scheme(stage, block):
            if not scheme.tunes:
                continue
            started = time.perf_counter()
            changed = scheme.scheme.tune_block(part, {name: weights[name] for name in part.linears}, scheme.options)
            share = (time.perf_counter() - started) / max(1, len(changed))
            for name, weight in changed.items():
                tuned[name] = weight
                reports[name] = reports[name].after_tuning(block.linears[name].weight, weight.dequantize(), seconds=share)
        return tuned

    def _block_work(self, stage: Stage, work: nn.Module, groups: list[list[str]]) -> BlockWork:
        linears = {name: work.get_submodule(name) for name in stage.targets}
        return BlockWork(
            name=stage.prefix,
            module=work,
            linears={name: module for name, module in linears.items() if isinstance(module, nn.Linear)},
            groups=groups,
            inputs=self._q.batches if self._q is not None else (),
            targets=self._f.batches if self._f is not None else None,
            forward=lambda module, h: self._forward(stage, module, h),
            fisher=lambda name: self._fisher(stage.targets[name]),
        )

    def _forward(self, stage: Stage, work: nn.Module, h: Tensor) -> Tensor:
        """Run a batch of hidden states, as they are kept, through a stage."""
        assert self._q is not None
        with narrow_passes(h.shape[-1], self._q.device) if self._narrow else nullcontext():
            return stage.forward(work, brought(h, self._q.device), self._context)

    def _propagate(self, stage: Stage, work: nn.Module, states: Activations, go: Callable[[int], None]) -> None:
        for batch in states.batches:
            batch.copy_(self._forward(stage, work, batch))
            go(len(batch))


def _before_targets(stages: Sequence[Stage]) -> frozenset[str]:
    """Return the names of the stages after which something is still to be quantized: windows have to go through them."""
    last = max((number for number, stage in enumerate(stages) if stage.targets), default=0)
    return frozenset(stage.name for stage in stages[:last])


def _takes_narrow_passes(decision: Decision) -> bool:
    """Whether a linear's scheme asks of the windows no more than moments of its inputs, which eight bits of them give."""
    if decision.scheme is None:
        return True
    scheme = decision.scheme
    rounds_inputs = decision.format is not None and decision.format.activation is not None
    return not (scheme.prepares or scheme.tunes or rounds_inputs or Needs.FISHER in scheme.needs)


def _joined(decisions: Any) -> Needs:
    needs = Needs.NONE
    for decision in decisions:
        if decision.scheme is not None:
            needs |= decision.scheme.needs
    return needs


def _by_scheme(stage: Stage, block: BlockWork) -> list[tuple[BlockWork, ResolvedScheme]]:
    """Return the block once for each scheme of its linears, with those linears only."""
    parts: list[tuple[BlockWork, ResolvedScheme]] = []
    schemes: list[ResolvedScheme] = []
    for decision in stage.targets.values():
        if decision.scheme is not None and decision.scheme not in schemes:
            schemes.append(decision.scheme)
    for scheme in schemes:
        linears = {name: linear for name, linear in block.linears.items() if stage.targets[name].scheme == scheme}
        groups = [[name for name in group if name in linears] for group in block.groups]
        parts.append((replace(block, linears=linears, groups=[group for group in groups if group]), scheme))
    return parts
