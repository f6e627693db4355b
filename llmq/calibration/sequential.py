"""Quantize a model block by block, each block for the inputs that the quantized blocks before it produce.

    windows -> embed -> h                                       all windows, fp32
    for each block, on a copy of it in fp32:
        h through the block, as it still is                     -> one Hessian for each group of linears of one input
        each linear's weight and its Hessian                    -> codes; the copy goes on with the numbers they mean
        h through the block, as it is now                       -> h for the next block

At any time there are one block's fp32 copy, its Hessians, and h; the model itself changes only where a linear is finished.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmq.algorithms.report import LayerReport
from llmq.algorithms.statistics import Statistics
from llmq.calibration.hessian import Hessian, LinearGroups, inputs_of
from llmq.calibration.recorder import CalibrationSet
from llmq.errors import SchemeError, TextError, UsageError
from llmq.numerics.grid import IntGrid
from llmq.progress import SILENT, Progress
from llmq.results.coverage import Coverage
from llmq.schemes.apply import decide, plain_weight, quantized_parameter, wrap_floats_
from llmq.schemes.base import ResolvedScheme
from llmq.schemes.cover import Decision, coverage

BATCH_TOKENS = 2048
"""Tokens that go through a block at once: enough for full speed, few enough for little memory."""


class BlockModel(Protocol):
    """What the walk needs of a model; `llmq.model.llama.Llama` has it."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order; each maps (h, context) to h."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Return h [B, T, hidden] of tokens [B, T]."""
        ...

    def context(self, h: Tensor) -> Any:
        """Return what blocks need besides `h`; it depends on h's shape and dtype only."""
        ...

    def head(self, h: Tensor) -> Tensor:
        """Return logits of `h` after the last block."""
        ...


@dataclass(frozen=True)
class _Stage:
    """A part of the model that is quantized at a time.

    Attributes:
        module: what owns the linears.
        run: maps (module, h, context) to h.
        targets: what to quantize, by the linear's name inside `module`.
        is_head: it is the last, and works on the model itself in its own dtype; nothing comes after it.
    """

    module: nn.Module
    run: Callable[[nn.Module, Tensor, Any], Tensor]
    targets: dict[str, Decision]
    is_head: bool = False


def quantize_sequential(
    model: nn.Module,
    resolved: ResolvedScheme,
    calibration: CalibrationSet,
    *,
    skip: Sequence[str] = (),
    skip_unfit: bool = False,
    progress: Progress = SILENT,
) -> tuple[Coverage, list[LayerReport]]:
    """Quantize a model in place, block by block, propagating quantized inputs.

    What can be checked is checked first. Where an activation turns out not to be finite, the blocks before it are quantized
    already: load the model again.

    Args:
        model: a `BlockModel`, in the dtype it is to compute in.
        resolved: a scheme. One that needs no statistics gives what `quantize_` gives, only slower.
        calibration: token windows.
        skip: see `schemes.apply.quantize_`.
        skip_unfit: see `schemes.apply.quantize_`.
        progress: hears of each window that went through a block (twice a block), and of every fallback.

    Returns:
        What was done to every parameter, and a report for each quantized linear, in the order in which they were done.

    Raises:
        ShapeError: linears do not fit the grid.
        SchemeError: activations are not finite, or a linear is not called by its block or the head.
        TextError: the windows hold tokens that the model does not have.
        UsageError: a pattern matches no linear, the windows are longer than the context, or the model is no `BlockModel`.
    """
    walked = _check_model(model, calibration)
    decisions = decide(model, resolved, skip=skip, skip_unfit=skip_unfit)
    dtypes = {decision.fqn: decision.parameter.dtype for decision in decisions}
    stages = _stages(walked, decisions)
    reports: list[LayerReport] = []
    batch = max(1, BATCH_TOKENS // calibration.info.length)
    with torch.no_grad():
        windows = calibration.tokens.to(next(model.parameters()).device, torch.int64)
        h = torch.cat([walked.embed(tokens).float() for tokens in torch.split(windows, batch)])
        batches = torch.split(h, batch)  # views: every stage replaces them in place
        context = walked.context(h[:1])
        with progress.task(f"{resolved.name}, block by block", total=2 * len(h) * len(stages)) as advance:
            for stage in stages:
                work = stage.module if stage.is_head else _float_copy(stage.module)
                reports += _quantize_stage(stage, work, resolved, (batches, context), advance)
                for x in batches:
                    if not stage.is_head:
                        x.copy_(stage.run(work, x, context))
                    advance(len(x))
    for report in reports:
        if report.fallback is not None:
            progress.note(f"{report.fqn} was rounded to nearest: {report.fallback}")
    wrap_floats_([decision for decision in decisions if decision.linear is not None and decision.format is not None])
    noise = {report.fqn: report.sqnr_db for report in reports}
    return coverage(resolved.name, decisions, dtypes=dtypes, noise=noise, compute=None), reports


def _quantize_stage(
    stage: _Stage,
    work: nn.Module,
    resolved: ResolvedScheme,
    inputs: tuple[Sequence[Tensor], Any],
    advance: Callable[[int], None],
) -> list[LayerReport]:
    """Quantize the linears of one stage; `work` (its copy in fp32) gets the numbers that their codes mean.

    Args:
        stage: what to quantize.
        work: the module that is run.
        resolved: the scheme.
        inputs: batches of h [B, T, hidden], and the context.
        advance: hears of each window.
    """
    batches, context = inputs
    linears = {name: module for name, module in work.named_modules() if name in stage.targets and isinstance(module, nn.Linear)}
    groups = _find_groups(stage, work, linears, batches[0][:1], context) if linears else []
    sums = {group[0]: Hessian() for group in groups if resolved.needs_calibration}
    with inputs_of({name: linears[name] for name in sums}, lambda name, x: sums[name].add(x)):
        for x in batches:
            if sums:
                stage.run(work, x, context)
            advance(len(x))
    reports: list[LayerReport] = []
    for group in groups:
        statistics = Statistics(_finite(sums.pop(group[0]), stage, group)) if sums else None
        reports += [_quantize_linear(stage.targets[name], linears[name], resolved, statistics) for name in group]
    return reports


def _quantize_linear(decision: Decision, work: nn.Linear, resolved: ResolvedScheme, statistics: Statistics | None) -> LayerReport:
    assert decision.linear is not None
    assert decision.format is not None
    weight = plain_weight(decision.parameter)
    quantized, report = resolved.quantize_weight(weight, statistics, decision.fqn)
    if work is not decision.linear:
        work.weight = nn.Parameter(quantized.dequantize(), requires_grad=False)
    decision.linear.weight = quantized_parameter(quantized, decision.format, weight.dtype)
    return report


def _finite(hessian: Hessian, stage: _Stage, group: list[str]) -> Tensor:
    value = hessian.value()
    if not torch.isfinite(value.diagonal()).all():
        names = ", ".join(stage.targets[name].fqn for name in group)
        raise SchemeError(f"the inputs of {names} are not finite during calibration; the model is broken before it is quantized.")
    return value


def _find_groups(stage: _Stage, work: nn.Module, linears: dict[str, nn.Linear], h: Tensor, context: Any) -> list[list[str]]:
    """Return the linears that read the same input, in the order of their calls, by their names inside the stage."""
    seen = LinearGroups()
    with inputs_of(linears, seen.see):
        stage.run(work, h, context)
    called = {name for group in seen.groups for name in group}
    silent = [stage.targets[name].fqn for name in linears if name not in called]
    if silent:
        raise SchemeError(f"{', '.join(silent)} did not run when the model did, so nothing is known of the inputs; use --skip.")
    return [list(dict.fromkeys(group)) for group in seen.groups]


def _check_model(model: nn.Module, calibration: CalibrationSet) -> BlockModel:
    missing = [name for name in ("blocks", "embed", "context", "head") if not hasattr(model, name)]
    if missing:
        raise UsageError(
            f"block by block calibration needs a model with blocks, embed, context and head (as llmq.model.llama.Llama has); "
            f"{type(model).__name__} has no {', '.join(missing)}. Give quantize_ the Hessians in `statistics` instead."
        )
    vocabulary = next((module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)), None)
    largest = int(calibration.tokens.max())
    if vocabulary is not None and largest >= vocabulary:
        raise TextError(
            f"the calibration set has token {largest}, and the model only {vocabulary} tokens; record it with this checkpoint's "
            "tokenizer."
        )
    walked: BlockModel = model  # type: ignore[assignment]  # checked above
    return walked


def _stages(model: BlockModel, decisions: Sequence[Decision]) -> list[_Stage]:
    """Cut the model into its blocks and the head, each with the linears that are to be quantized there."""
    targets = {
        id(decision.linear): decision
        for decision in decisions
        if decision.covered and decision.format is not None and isinstance(decision.format.weight, IntGrid)
    }
    stages = []
    for block in model.blocks:
        own = {name: targets.pop(id(module)) for name, module in block.named_modules() if id(module) in targets}
        stages.append(_Stage(block, lambda module, h, context: module(h, context), own))
    if targets:
        assert isinstance(model, nn.Module)
        own = {name: targets[id(module)] for name, module in model.named_modules() if id(module) in targets}
        dtype = next(model.parameters()).dtype
        stages.append(_Stage(model, lambda *args: model.head(args[1].to(dtype)), own, is_head=True))
    return stages


def _float_copy(module: nn.Module) -> nn.Module:
    """Return a copy in fp32, with plain weights: the values of the original, and no kernel's rounding."""
    work = copy.deepcopy(module)
    for owner in work.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            plain = plain_weight(parameter).float()
            setattr(owner, name, nn.Parameter(plain, requires_grad=False))
    return work
