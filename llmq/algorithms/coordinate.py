"""Coordinate descent over codes: every code in turn becomes the one that is best while all others stay.

The loss tr(H_O E H_I E^T) is a quadratic in the number w_hat of one entry (i, j), with half its gradient -p, p = (H_O E
H_I)_ij, and curvature (H_O)_ii (H_I)_jj; so the best code is the one nearest to w_hat + p / curvature. Sweeps go column by
column, in the order in which GPTQ rounds.

Without H_O the entries of a column do not know of each other, and a column is changed at once. With H_O they do. What each
wants is found for all of them; those that still gain when all the others get what they want are changed together, if that
lowers the loss, else the half of them that gain most, and so on; and the column is asked again, a few times. Each change
lowers the loss, computed exactly from H_O between the entries that change.

Most of the work is matrix products: a block's columns of the gradient are formed at once, and changes reach later columns of
the block by a product for each panel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.algorithms.columns import ColumnGrid
from llmq.algorithms.metric import Metric
from llmq.algorithms.products import narrowed, product
from llmq.algorithms.refit import Scales
from llmq.algorithms.rtn import numbers_of
from llmq.numerics.grid import IntGrid

BLOCK = 128
"""Columns whose gradient is formed at once."""

PANEL = 16
"""Columns whose changes reach the others of a block together."""

ROUNDS = 4
"""How often a column is asked again where its entries are coupled."""


def sweep(
    target: Tensor, codes: Tensor, scales: Scales, grid: IntGrid, metric: Metric, order: Tensor | None = None
) -> tuple[Tensor, int]:
    """Go over all codes once.

    Args:
        target: [N, K] fp32 or fp64, what the weight should be; everything is computed in its dtype.
        codes: [N, K] of the grid; not changed.
        scales: scale and zero point [N, groups], as they are stored.
        grid: the integer grid.
        metric: what is made small; never larger afterwards.
        order: [K], the order of the columns; None: by falling diagonal of H_I.

    Returns:
        The new codes, and how many changed.
    """
    n, k = target.shape
    metric.check(n, k)
    if order is None:
        order = torch.argsort(metric.inputs.diagonal(), descending=True, stable=True)
    state = _State(target, codes, scales, grid, metric, order)
    for start in range(0, k, BLOCK):
        state.block(start, min(start + BLOCK, k))
    found = torch.empty_like(codes)
    found[:, order] = state.codes.to(codes.dtype).t()
    return found, int((found != codes).sum())


def _ordered(matrix: Tensor, order: Tensor) -> Tensor:
    """Return the columns of a matrix [N, K] in this order, as rows [K, N]."""
    return matrix.index_select(1, order).t().contiguous()


class _State:
    """Everything transposed and ordered: row k is the k-th column to be visited."""

    def __init__(self, target: Tensor, codes: Tensor, scales: Scales, grid: IntGrid, metric: Metric, order: Tensor) -> None:
        dtype = target.dtype
        scale, zero_point = scales
        self.group = (order // (target.shape[1] // scale.shape[1])).tolist()
        self.grids = ColumnGrid(grid, scale, zero_point, dtype)
        self.numbers = _ordered(numbers_of(codes, grid, scale, zero_point, dtype), order)
        self.codes = _ordered(codes, order).to(dtype)
        self.order, self.inputs = order, metric.inputs
        self.outputs = None if metric.outputs is None else metric.outputs.to(dtype).contiguous()
        error = _ordered(target, order).sub_(self.numbers)
        # E^T without H_O, (H_O E)^T with it: what has only to be multiplied by H_I to be the gradient
        self.error = error if self.outputs is None else error @ self.outputs
        self.narrow = narrowed(self.error, len(order))  # what `product` takes of it; kept up with it

    def block(self, start: int, stop: int) -> None:
        """Visit the columns from `start` to `stop`."""
        # a block's rows of H_I in this order, so that no other copy of it is needed
        rows = self.inputs.index_select(0, self.order[start:stop]).to(self.error.dtype).index_select(1, self.order)
        gradient = product(rows, self.narrow)  # [block, N]
        moves = torch.zeros_like(gradient)  # by how much H_O times a column's numbers changed
        own = rows[:, start:stop].contiguous()
        curvatures = own.diagonal().tolist()
        for low in range(0, stop - start, PANEL):
            high = min(low + PANEL, stop - start)
            gradient[low:high].addmm_(own[:low, low:high].t(), moves[:low], alpha=-1)
            for inside in range(low, high):
                p = gradient[inside].addmv_(moves[low:inside].t(), own[low:inside, inside], alpha=-1)
                if curvatures[inside] <= 0:
                    continue
                if self.outputs is None:
                    self._move(start + inside, p, curvatures[inside], moves[inside])
                else:
                    moves[inside] = self._move_coupled(start + inside, p, curvatures[inside], self.outputs)
        self.error[start:stop] -= moves
        if self.narrow is not self.error:
            self.narrow[start:stop] = self.error[start:stop]

    def _move(self, column: int, p: Tensor, curvature: float, change: Tensor) -> None:
        """Change a column whose entries are independent; `change` [N] becomes how its numbers changed."""
        own = self.numbers[column]
        codes, numbers = self.grids.nearest(self.group[column], torch.add(own, p, alpha=1 / curvature))
        torch.sub(numbers, own, out=change)
        self.codes[column], self.numbers[column] = codes, numbers

    def _move_coupled(self, column: int, p: Tensor, curvature: float, outputs: Tensor) -> Tensor:
        """Change a column whose entries are coupled by H_O; returns H_O times the change of its numbers."""
        own = outputs.diagonal() * curvature
        total = torch.zeros_like(p)
        diagonal = outputs.diagonal()
        for _ in range(ROUNDS):
            codes, numbers = self.grids.nearest(self.group[column], self.numbers[column] + p / own)
            change = numbers - self.numbers[column]
            chosen = (codes != self.codes[column]).nonzero()[:, 0]
            if not len(chosen):
                break
            moved = _take(_Column(p, change, outputs, diagonal, curvature), chosen)
            if moved is None:
                break
            chosen, effect = moved
            self.codes[column, chosen] = codes[chosen]
            self.numbers[column, chosen] = numbers[chosen]
            total += effect
            p -= curvature * effect
        return total


@dataclass(frozen=True, slots=True)
class _Column:
    """What a coupled column wants: half its negative gradient p [N], the changes of its numbers [N], and its curvature."""

    p: Tensor
    change: Tensor
    outputs: Tensor
    diagonal: Tensor
    curvature: float

    def gains(self, chosen: Tensor, between: Tensor) -> Tensor:
        """Return what each chosen entry adds to the fall of the loss; between: its share of the curvature with others."""
        step = self.change[chosen]
        return step * (2 * self.p[chosen] - self.curvature * between)


def _take(column: _Column, chosen: Tensor) -> tuple[Tensor, Tensor] | None:
    """Find entries of `chosen` whose changes together lower the loss; returns them and H_O times their changes."""
    step = column.change[chosen]
    effect = step @ column.outputs[chosen]
    # what an entry gains if all the others move as well: twice the curvature with them, once its own
    joint = column.gains(chosen, 2 * effect[chosen] - column.diagonal[chosen] * step)
    willing = joint > 0
    count = int(willing.sum())
    if count < len(chosen):
        alone = column.gains(chosen, column.diagonal[chosen] * step)
        chosen = chosen[willing] if count else chosen[alone.argmax()][None]
        effect = column.change[chosen] @ column.outputs[chosen]
    while len(chosen):
        if column.gains(chosen, effect[chosen]).sum().item() > 0:
            return chosen, effect
        if len(chosen) == 1:
            return None
        alone = column.gains(chosen, column.diagonal[chosen] * column.change[chosen])
        chosen = chosen[torch.argsort(alone, descending=True, stable=True)[: len(chosen) // 2]]
        effect = column.change[chosen] @ column.outputs[chosen]
    return None
