"""From a weight, its statistics and a grid to a quantized weight: search, correction, GPTQ, re-fit and sweeps, each optional.

    1  target   W, or W corrected for what quantized blocks before it do to its inputs        `correction`
    2  scales   of each group's range, or searched for the least weighted error                `scale_search`
    3  codes    GPTQ with these scales under H_I, or its two-sided form under H_O (x) H_I      `gptq`, `feedback`
    4  polish   scales and zero points for the codes, then codes for the scales, `sweeps` times `refit`, `coordinate`

Every step after the third keeps or lowers tr(H_O E H_I E^T), E = target - W_hat. H_O, the output factor of the Fisher
information, is part of it only under the metrics 'outputs' and 'fisher' (YAQA, arXiv:2505.22988).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from llmq.algorithms.coordinate import sweep
from llmq.algorithms.correction import corrected_target
from llmq.algorithms.feedback import two_sided
from llmq.algorithms.gptq import Factor, Factorised, GptqOptions, factorise, feed_back
from llmq.algorithms.metric import Metric, damped
from llmq.algorithms.refit import Scales, refit
from llmq.algorithms.report import LayerReport, sqnr_db
from llmq.algorithms.rtn import choose_scales, numbers_of, quantize_rtn, round_to_grid, work_dtype
from llmq.algorithms.scale_search import SearchOptions, search_scales
from llmq.algorithms.statistics import Statistics
from llmq.errors import SchemeError, UsageError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import IntGrid
from llmq.numerics.weight import QuantizedWeight

Search = Literal["range", "error", "weighted"]
MetricName = Literal["inputs", "outputs", "fisher"]


@dataclass(frozen=True, slots=True)
class RoundingOptions:
    """Which steps are taken.

    Attributes:
        search: scales from each group's range, from its error with all inputs alike, or weighted by the diagonal of H_I.
        correction: how much of the upstream error is corrected, 0 to 1; 0 needs no upstream statistics.
        gptq: choose codes by GPTQ; otherwise by rounding to nearest.
        refit: re-fit scales and zero points after GPTQ and after each sweep.
        sweeps: of coordinate descent.
        metric: 'inputs': H_I is the Hessian of the inputs, H_O the identity; 'outputs': H_O is the output factor of the Fisher
            information; 'fisher': so is H_I its input factor.
        damping: added to the diagonals of H_I and H_O, as a fraction of the mean.
        act_order: take columns by falling diagonal of H_I.
        block_size: see `GptqOptions`.
        mapping: how a range is laid over codes where scales are not searched.
        candidates: of the search, see `SearchOptions`; each is improved once, since what follows re-fits scales anyway.
        trace: compute the loss after every step for the report, which costs a product with H_I each.
    """

    search: Search = "weighted"
    correction: float = 0.0
    gptq: bool = True
    refit: bool = True
    sweeps: int = 1
    metric: MetricName = "inputs"
    damping: float = 0.01
    act_order: bool = True
    block_size: int = 128
    mapping: MappingType | None = None
    candidates: int = 8
    trace: bool = False

    def __post_init__(self) -> None:
        if self.sweeps < 0:
            raise UsageError(f"sweeps must be 0 or more, got {self.sweeps}.")
        if not 0 <= self.correction <= 1:
            raise UsageError(f"correction must be from 0 to 1, got {self.correction}.")
        self.gptq_options()

    def gptq_options(self) -> GptqOptions:
        """Return those that GPTQ takes."""
        return GptqOptions(self.damping, self.act_order, self.block_size, self.mapping)

    def search_options(self) -> SearchOptions:
        """Return those that the search for scales takes."""
        return SearchOptions(candidates=self.candidates, rounds=1, mapping=self.mapping)


@dataclass(frozen=True, slots=True)
class RoundingReport:
    """What was done, and what each step brought.

    Attributes:
        loss: tr(H_O E H_I E^T) without damping, E = target - W_hat, of what was kept; None when statistics are not finite.
        rtn_loss: the same for the weight rounded to nearest with scales of its groups' ranges; never below `loss`.
        damping: the fraction that was used; None when statistics are not finite.
        dead_columns: inputs that were always zero.
        rtn_rows: rows for which rounding to nearest lost less, and was kept.
        fallback: why the whole weight was rounded to nearest; None where it was not.
        steps: names of the steps and the damped loss after each, in order, the first 'rtn'; empty without `trace`.
    """

    loss: float | None
    rtn_loss: float | None
    damping: float | None = None
    dead_columns: int = 0
    rtn_rows: int = 0
    fallback: str | None = None
    steps: tuple[tuple[str, float], ...] = field(default=())

    def of_layer(self, fqn: str, weight: Tensor, quantized: QuantizedWeight, *, seconds: float) -> LayerReport:
        """Return it as the report of the linear `fqn` with this weight [N, K]."""
        return LayerReport(
            fqn,
            (weight.shape[0], weight.shape[1]),
            sqnr_db(weight, quantized),
            loss=self.loss,
            rtn_loss=self.rtn_loss,
            damping=self.damping,
            dead_columns=self.dead_columns,
            rtn_rows=self.rtn_rows,
            fallback=self.fallback,
            seconds=seconds,
        )


def round_linear(
    weight: Tensor,
    statistics: Statistics,
    grid: IntGrid,
    options: RoundingOptions,
    *,
    factorised: Factorised | None = None,
) -> tuple[QuantizedWeight, RoundingReport]:
    """Quantize one weight. Nothing that is passed is changed.

    Args:
        weight: [N, K], floating point.
        statistics: of the linear; which are needed follows from the options.
        grid: the integer grid.
        options: see `RoundingOptions`.
        factorised: what `factorise` returned for H_I and `options.gptq_options()`; None: it is called here.

    Returns:
        The quantized weight, and what was done. The loss is never above that of rounding to nearest.

    Raises:
        ShapeError: the weight does not fit the grid, or the statistics not the weight.
        SchemeError: statistics are missing.
    """
    plain = metric_of(statistics, options.metric)
    n, k = weight.shape
    grid.check(n, k)
    plain.check(n, k)
    nearest = quantize_rtn(weight, grid, mapping=options.mapping)
    tensors = [plain.inputs, plain.outputs, statistics.upstream if options.correction > 0 else None]
    # a sum is finite where all of it is, and needs no room for a mask of [K, K]
    if not all(bool(torch.isfinite(tensor.sum())) for tensor in tensors if tensor is not None):
        return nearest, RoundingReport(None, None, rtn_rows=n, fallback="the Hessian is not finite")

    if factorised is None:
        factorised = _factorised(plain.inputs, options.gptq_options())
    factor, tried = factorised
    dead = int((plain.inputs.diagonal() == 0).sum())
    work = weight.to(torch.promote_types(work_dtype(weight), plain.inputs.dtype))
    if factor is None:
        loss = plain.loss(work - nearest.dequantize(work.dtype))
        why = f"the Hessian is not positive definite, even with {tried[-1]:g} of its mean diagonal added"
        return nearest, RoundingReport(loss, loss, tried[-1], dead, n, why)
    rows_factor = None
    if plain.outputs is not None:
        rows_factor, tried = factorise(plain.outputs, options.gptq_options())
        if rows_factor is None:
            loss = plain.loss(work - nearest.dequantize(work.dtype))
            why = f"the output factor is not positive definite, even with {tried[-1]:g} of its mean diagonal added"
            return nearest, RoundingReport(loss, loss, tried[-1], dead, n, why)
    metric = damped_metric(plain, factor.damping, factor.damping if rows_factor is None else rows_factor.damping)
    target = _target(work, statistics, options, factor)
    steps = [("rtn", metric.loss(target - nearest.dequantize(work.dtype)))] if options.trace else []

    scales = _scales(target, grid, metric, options)
    if options.gptq and rows_factor is not None:
        codes = two_sided(target, scales, grid, factor, rows_factor)
    elif options.gptq:
        codes = feed_back(target, scales, grid, factor, options.block_size)
    else:
        codes = round_to_grid(target, grid, *scales)
    if options.trace:
        steps.append(("gptq" if options.gptq else "search", _loss(target, codes, scales, grid, metric)))
    polishing = Polishing(options.sweeps, options.refit, options.trace)
    codes, scales, polished = polish(target, codes, scales, grid, metric, polishing)
    quantized = QuantizedWeight.from_codes(grid, codes, *scales)
    return _keep_better(quantized, nearest, target, plain, RoundingReport(0, 0, factor.damping, dead, steps=(*steps, *polished)))


@dataclass(frozen=True, slots=True)
class Polishing:
    """How often coordinate descent goes over the codes, whether scales are re-fitted in between, and whether losses are kept."""

    sweeps: int
    refit: bool = True
    trace: bool = False


def polish(
    target: Tensor, codes: Tensor, scales: Scales, grid: IntGrid, metric: Metric, how: Polishing
) -> tuple[Tensor, Scales, list[tuple[str, float]]]:
    """Lower the loss of a quantized weight, wherever its codes and scales come from: sweep and re-fit by turns.

    Args:
        target: [N, K] fp32 or fp64, what the weight should be.
        codes: [N, K] of the grid.
        scales: scale and zero point [N, groups].
        grid: the integer grid.
        metric: damped; see `damped_metric`.
        how: see `Polishing`; without sweeps there is one re-fit.

    Returns:
        Codes, scales, and with `trace` the loss after each step.
    """
    steps: list[tuple[str, float]] = []
    changed = 1
    for turn in range(max(how.sweeps, 1)):
        if turn < how.sweeps:
            codes, changed = sweep(target, codes, scales, grid, metric)
            if how.trace:
                steps.append(("sweep", _loss(target, codes, scales, grid, metric)))
        if how.refit:
            scales = refit(target, codes, scales, grid, metric)
            if how.trace:
                steps.append(("refit", _loss(target, codes, scales, grid, metric)))
        if not changed:
            break
    return codes, scales, steps


_KEPT: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Factors by the Hessian that they are of, as long as that lives: linears of one input are quantized one after another."""


def _factorised(hessian: Tensor, options: GptqOptions) -> Factorised:
    key = (options.damping, options.act_order, hessian._version)  # noqa: SLF001 - the only way to see a change: a Hessian that was changed since is another one
    kept = _KEPT.get(hessian, None)  # type: ignore[no-untyped-call]  # torch's own gap
    if kept is None or kept[0] != key:
        kept = (key, factorise(hessian, options))
        _KEPT[hessian] = kept
    found: Factorised = kept[1]
    return found


def metric_of(statistics: Statistics, name: MetricName) -> Metric:
    """Return the undamped metric of that name; raises SchemeError when a factor that it needs is missing."""
    inputs = statistics.input_factor if name == "fisher" else statistics.hessian
    outputs = None if name == "inputs" else statistics.output_factor
    if inputs is None or (outputs is None and name != "inputs"):
        raise SchemeError(f"metric {name!r} needs the Fisher factors of the linear; gather them, or use metric='inputs'.")
    return Metric(inputs, outputs)


def damped_metric(metric: Metric, inputs: float, outputs: float) -> Metric:
    """Return the metric with these fractions of the mean diagonals added."""
    return Metric(damped(metric.inputs, inputs), None if metric.outputs is None else damped(metric.outputs, outputs))


def _target(work: Tensor, statistics: Statistics, options: RoundingOptions, factor: Factor) -> Tensor:
    if options.correction == 0:
        return work
    if statistics.upstream is None:
        raise SchemeError(
            "correction needs statistics of the original model's inputs (upstream); gather them, or use correction=0."
        )
    if options.metric == "fisher":  # the factor is that of H_I, and the correction is about the inputs themselves
        own, _ = factorise(statistics.hessian, options.gptq_options())
        return work if own is None else corrected_target(work, own, statistics.upstream, options.correction)
    return corrected_target(work, factor, statistics.upstream, options.correction)


def _scales(target: Tensor, grid: IntGrid, metric: Metric, options: RoundingOptions) -> Scales:
    if options.search == "range":
        return choose_scales(target, grid, mapping=options.mapping)
    importance = metric.inputs.diagonal() if options.search == "weighted" else None
    return search_scales(target, grid, importance, options.search_options())


def _loss(target: Tensor, codes: Tensor, scales: Scales, grid: IntGrid, metric: Metric) -> float:
    return metric.loss(target - numbers_of(codes, grid, *scales, target.dtype))


def _keep_better(
    quantized: QuantizedWeight, nearest: QuantizedWeight, target: Tensor, metric: Metric, report: RoundingReport
) -> tuple[QuantizedWeight, RoundingReport]:
    """Keep rounding to nearest where it loses less without damping: by row, or as a whole where rows are coupled."""
    losses = metric.row_losses(target - quantized.dequantize(target.dtype)).clamp(min=0 if metric.outputs is None else -torch.inf)
    others = metric.row_losses(target - nearest.dequantize(target.dtype)).clamp(min=0 if metric.outputs is None else -torch.inf)
    worse = losses > others if metric.outputs is None else (losses.sum() > others.sum()).expand(len(losses))
    rows = int(worse.sum())
    if rows:
        quantized = _replace_rows(quantized, nearest, worse)
    loss = torch.where(worse, others, losses).sum().item()
    done = RoundingReport(
        max(loss, 0.0), max(others.sum().item(), 0.0), report.damping, report.dead_columns, rows, steps=report.steps
    )
    return quantized, done


def _replace_rows(quantized: QuantizedWeight, other: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    assert quantized.scale is not None
    assert other.scale is not None
    zero_point = quantized.zero_point
    if zero_point is not None and other.zero_point is not None:
        zero_point = torch.where(rows[:, None], other.zero_point, zero_point)
    qdata = torch.where(rows[:, None], other.qdata, quantized.qdata)
    scale = torch.where(rows[:, None], other.scale, quantized.scale)
    return QuantizedWeight(quantized.grid, quantized.shape, qdata, scale, zero_point)
