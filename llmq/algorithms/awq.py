"""AWQ (Lin et al., arXiv:2306.00978): scales that move the grid's precision to the weights that large inputs multiply.

A weight column multiplied by s > 1 before rounding, and divided by it afterwards, has an error s times smaller unless it widens
its group's range. The scales are folded into what produces the inputs (`algorithms.folding`). The paper takes, with x_mean the
mean |x| of a channel and one exponent a for all linears that read it,

    s = x_mean^a                             (equation 5)
    s = x_mean^a / w_mean^(1 - a)            ('both', as its code has it; w_mean: mean |W| relative to the groups' largest)

and searches a for the least error of the output of the attention or the MLP that these linears are part of, with their weights
rounded. `search_clip` then narrows every group's range where that lowers the error of the linear's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmq.algorithms.folding import FoldPair, fold_, fold_pairs
from llmq.algorithms.rtn import quantize_rtn, work_dtype
from llmq.algorithms.simulate import Forward, Replay, Work, part_of, record
from llmq.errors import ShapeError, UsageError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import IntGrid

FLOOR = 1e-4
"""Channels are taken to be at least this fraction of the largest: a channel that never fires must not get a scale of 0."""

NARROW = ("q_proj", "k_proj")
"""Linears whose ranges are not narrowed: their product goes through a softmax, which a clipped outlier changes most."""


@dataclass(frozen=True, slots=True)
class AwqOptions:
    """How scales are searched.

    Attributes:
        candidates: exponents that are tried, from 0 to just below 1.
        scales: 'inputs' (equation 5), or 'both'.
        tokens: that errors are measured on.
    """

    candidates: int = 20
    scales: Literal["inputs", "both"] = "both"
    tokens: int = 8192

    def __post_init__(self) -> None:
        if min(self.candidates, self.tokens) < 1:
            raise UsageError("candidates and tokens must be at least 1.")


@dataclass(frozen=True, slots=True)
class AwqReport:
    """What was done at one place.

    Attributes:
        producer: where the scales were folded into.
        exponent: a; None where no scales were better than none.
        error: of the output, see `Replay.error`, with rounded weights and the scales that were kept.
        plain_error: the same without scales; never below `error`.
    """

    producer: str
    exponent: float | None
    error: float
    plain_error: float


def awq_(work: Work, grid: IntGrid, mapping: MappingType | None, options: AwqOptions) -> list[AwqReport]:
    """Find scales at every place of a block and fold them, in place.

    Args:
        work: the block; linears that are not in `work.linears` are left alone.
        grid: what weights are rounded to.
        mapping: see `quantize_rtn`.
        options: see `AwqOptions`.

    Returns:
        A report for every place.

    Raises:
        SchemeError: the block has no places that scales can be folded into, or its inputs are not finite.
        ShapeError: a weight does not fit the grid.
    """
    reports = []
    for pair in fold_pairs(work.module, work.linears):
        part = part_of(pair.consumers[0])
        seen = record(work, [part], inputs_of=pair.consumers[:1], tokens=options.tokens)
        linears = {name: work.linears[name] for name in pair.consumers}
        x_mean = pair.gather(seen.inputs[pair.consumers[0]].abs().mean(0)).mean(0)
        w_mean = _relative_mean(linears, pair, grid) if options.scales == "both" else None
        plain = _error(seen.replays[part], linears, None, grid, mapping)
        best, exponent, kept = plain, None, None
        for index in range(options.candidates):
            power = index / options.candidates
            scale = awq_scale(x_mean, w_mean, power)
            error = _error(seen.replays[part], linears, pair.expand(scale), grid, mapping)
            if error < best:
                best, exponent, kept = error, power, scale
        if kept is not None:
            fold_(work.module, pair, kept)
        reports.append(AwqReport(pair.producer, exponent, best, plain))
    return reports


def awq_scale(x_mean: Tensor, w_mean: Tensor | None, power: float) -> Tensor:
    """Return s [C] for an exponent, divided by the geometric mean of its largest and smallest value; see the module.

    Args:
        x_mean: [C] mean |x|.
        w_mean: [C] mean relative |W|; None: equation 5.
        power: a, from 0 to 1.
    """
    scale = _floored(x_mean) ** power
    if w_mean is not None:
        scale = scale / _floored(w_mean) ** (1 - power)
    return scale / (scale.max() * scale.min()).sqrt()


def search_clip(weight: Tensor, hessian: Tensor, grid: IntGrid, *, mapping: MappingType | None = None, steps: int = 20) -> Tensor:
    """Narrow the range of every group where that lowers the error of the output of its own inputs.

    A group's range is shrunk to 1, 1 - 0.5 / steps, … of itself (to just above half), and what lies outside is clamped. Of these
    the one with the least e H_gg e^T is kept, e the group's error after rounding and H_gg its block on the Hessian's diagonal.

    Args:
        weight: [N, K], floating point; not changed.
        hessian: [K, K] 2/n sum x^T x of the inputs.
        grid: what weights are rounded to.
        mapping: see `quantize_rtn`.
        steps: ranges to try.

    Returns:
        The clamped weight [N, K], to be rounded to nearest; in `weight`'s working dtype.

    Raises:
        ShapeError: the weight does not fit the grid, or the Hessian not the weight.
        UsageError: no range to try.
    """
    n, k = weight.shape
    grid.check(n, k)
    if tuple(hessian.shape) != (k, k):
        raise ShapeError(f"a weight of {k} inputs needs a Hessian [{k}, {k}], got {list(hessian.shape)}.")
    if steps < 1:
        raise UsageError(f"at least 1 range has to be tried, got {steps}.")
    size = grid.group_size or k
    work = weight.to(work_dtype(weight))
    groups = work.reshape(n, k // size, size)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    blocks = torch.stack([hessian[start : start + size, start : start + size] for start in range(0, k, size)]).to(work.dtype)
    best, least = groups, torch.full((n, k // size), torch.inf, dtype=work.dtype, device=work.device)
    for step in range(steps):
        share = 1 - 0.5 * step / steps
        clamped = groups.clamp(low * share, high * share)
        numbers = quantize_rtn(clamped.reshape(n, k), grid, mapping=mapping).dequantize(work.dtype).reshape(groups.shape)
        error = numbers - groups
        loss = (torch.einsum("ngi,gij->ngj", error, blocks) * error).sum(2)
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better[..., None], clamped, best)
    return best.reshape(n, k)


def may_clip(name: str) -> bool:
    """Return whether AWQ narrows the ranges of the linear of that name."""
    return not name.endswith(NARROW)


def _error(
    replay: Replay, linears: dict[str, nn.Linear], columns: Tensor | None, grid: IntGrid, mapping: MappingType | None
) -> float:
    def make(linear: nn.Linear) -> Forward:
        weight = linear.weight.detach()
        if columns is None:
            numbers = quantize_rtn(weight, grid, mapping=mapping).dequantize()
        else:
            numbers = quantize_rtn(weight * columns, grid, mapping=mapping).dequantize() / columns
        return lambda x: F.linear(x, numbers, linear.bias)

    return replay.error({name: make(linear) for name, linear in linears.items()})


def _relative_mean(linears: dict[str, nn.Linear], pair: FoldPair, grid: IntGrid) -> Tensor:
    """Return [C]: the mean over consumers, rows and repeats of |W| relative to its group's largest."""
    rows = torch.cat([linear.weight.detach().float().abs() for linear in linears.values()])
    n, k = rows.shape
    groups = rows.reshape(n, -1, grid.group_size or k)
    relative = groups / groups.amax(2, keepdim=True).clamp_min(torch.finfo(torch.float32).smallest_normal)
    return pair.gather(relative.reshape(n, k).mean(0)).mean(0)


def _floored(values: Tensor) -> Tensor:
    wide = values.float()
    return wide.clamp_min(max(float(wide.max()) * FLOOR, torch.finfo(torch.float32).smallest_normal))
