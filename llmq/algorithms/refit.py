"""Re-fit of scales and zero points under the full metric, with the codes as they are: a least squares problem in closed form.

With its codes fixed, a row is linear in its scales and floating zero points, theta [P]: w_hat = sum over p of theta_p u_p,
where u_p is the group's codes (as the grid counts them) or, for a zero point, ones; both 0 outside of the group. The loss of
a change d of theta, at the error e, is

    d^T A d - 2 r^T d + const,     A = u H_I u^T [P, P],    r = u (H_O E H_I)_row / (H_O)_row,row,

with the least at A d = r. A ridge, a small fraction of A's diagonal, keeps groups still that the metric hardly sees. What
comes out is rounded to the dtype in which it is stored. Without H_O rows do not know of each other, and a row is changed only
if its loss falls then. With H_O blocks of rows are changed one after another, each by the step along d that is best for the
block, again only if the loss falls. Integer zero points stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.algorithms.metric import Metric
from llmq.algorithms.products import narrowed, product
from llmq.algorithms.rtn import numbers_of
from llmq.numerics.grid import IntGrid
from llmq.numerics.weight import torch_dtype

CHUNK_BYTES = 32 * 2**20
"""Memory for the systems [rows, P, P] in fp64 that are solved at a time."""

BLOCK_ROWS = 64
"""Rows that change together where rows are coupled."""

RIDGE = 1e-4
"""Fraction of A's diagonal that is added to it."""

Scales = tuple[Tensor, Tensor | None]


def refit(target: Tensor, codes: Tensor, scales: Scales, grid: IntGrid, metric: Metric) -> Scales:
    """Return better scales and zero points for these codes, as they are stored.

    Args:
        target: [N, K] fp32 or fp64, what the weight should be; everything is computed in its dtype, systems in fp64.
        codes: [N, K] of the grid.
        scales: scale and zero point [N, groups]; not changed.
        grid: the integer grid.
        metric: what is made small; never larger afterwards.
    """
    n, k = target.shape
    metric.check(n, k)
    scale, zero_point = scales[0].clone(), None if scales[1] is None else scales[1].clone()
    groups = scale.shape[1]
    unknowns = groups * (2 if grid.zero_point == "float" else 1)
    rows = chunk_rows(k, unknowns)
    if metric.outputs is not None:
        rows = min(rows, BLOCK_ROWS)
    error = target - numbers_of(codes, grid, scale, zero_point, target.dtype)
    inputs = _Inputs(metric.inputs.to(target.dtype), groups)
    by_inputs = product(error, inputs.whole) if metric.outputs is not None else None  # E H_I
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        system = _System(codes[part], scale[part], zero_point, part, grid, inputs)
        if by_inputs is None or metric.outputs is None:
            moments = system.moments(product(error[part], inputs.whole))
            change = system.rounded_change(system.solve(moments))
            gain = 2 * (moments * change).sum(1) - system.curvature(change)
            system.apply(scale, zero_point, gain > 0)
            continue
        coupling = metric.outputs[part].to(target.dtype)
        own = coupling[:, part]
        moments = system.moments(coupling @ by_inputs)
        change = system.solve(moments / own.diagonal().double()[:, None])
        slope, bend = system.along(change, moments, own)
        if not (bend > 0 and slope > 0):
            continue
        change = system.rounded_change(change * (slope / bend))
        slope, bend = system.along(change, moments, own)
        if 2 * slope - bend > 0:
            system.apply(scale, zero_point, torch.ones(part.stop - part.start, dtype=torch.bool, device=scale.device))
            numbers = numbers_of(codes[part], grid, scale[part], None if zero_point is None else zero_point[part], target.dtype)
            by_inputs[part] = product(target[part] - numbers, inputs.whole)
    return scale, zero_point


def chunk_rows(k: int, unknowns: int) -> int:
    """Return how many rows of `k` numbers, with systems of so many unknowns, are solved at a time."""
    # beside a row's system there are about four rows of K numbers
    return max(1, CHUNK_BYTES // (8 * unknowns**2 + 16 * k))


class _Inputs:
    """H_I [K, K] and, where groups are as wide as here, its sums over the columns of each group, and over its rows as well."""

    def __init__(self, whole: Tensor, groups: int) -> None:
        k = len(whole)
        self.whole = narrowed(whole, k)
        self.by_group = whole.view(k, groups, k // groups).sum(-1)  # [K, groups]
        self.between = self.by_group.view(groups, k // groups, groups).sum(1, dtype=torch.float64)  # [groups, groups]


class _System:
    """The least squares problems of some rows; P unknowns a row: all scales, then all floating zero points."""

    def __init__(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, part: slice, grid: IntGrid, inputs: _Inputs
    ) -> None:
        self.part, self.stored = part, torch_dtype(grid.scale_dtype)
        self.rows, self.groups = scale.shape
        self.size = codes.shape[1] // self.groups
        self.with_zero = grid.zero_point == "float"
        dtype = inputs.by_group.dtype
        centred = codes.to(dtype).view(self.rows, self.groups, self.size)
        if zero_point is not None:
            offset = torch.full_like(scale, grid.mid, dtype=dtype) if self.with_zero else zero_point[part].to(dtype)
            centred = centred - offset[..., None]
        self.basis = centred.reshape(self.rows, -1)  # u of the scales, [rows, K]
        self.inputs = inputs
        self.matrix = self._matrix()
        self.theta = scale.double()
        if self.with_zero and zero_point is not None:
            self.theta = torch.cat([self.theta, zero_point[part].double()], 1)

    def _sums(self, x: Tensor, first: int = 0) -> Tensor:
        """Sum x [rows, K of the groups from `first` on] over each group, [rows, groups - first]."""
        return x.view(x.shape[0], self.groups - first, self.size).sum(-1)

    def _matrix(self) -> Tensor:
        """A [rows, P, P] in fp64."""
        g, size = self.groups, self.size
        unknowns = 2 * g if self.with_zero else g
        matrix = torch.zeros(self.rows, unknowns, unknowns, dtype=torch.float64, device=self.basis.device)
        for group in range(g):
            own = slice(group * size, (group + 1) * size)
            # of a scale with all scales from this group on; and with all zero points
            tail = product(self.basis[:, own], self.inputs.whole[own, own.start :])
            matrix[:, group, group:g] = self._sums(tail.mul_(self.basis[:, own.start :]), group).double()
            matrix[:, group:g, group] = matrix[:, group, group:g].clone()  # they share the entry on the diagonal
            if self.with_zero:
                matrix[:, group, g:] = (self.basis[:, own] @ self.inputs.by_group[own]).double()
                matrix[:, g:, group] = matrix[:, group, g:]
        if self.with_zero:
            matrix[:, g:, g:] = self.inputs.between
        return matrix

    def moments(self, gradient: Tensor) -> Tensor:
        """Return u gradient, [rows, P] in fp64, for a gradient [rows, K]."""
        found = self._sums(gradient * self.basis).double()
        return torch.cat([found, self._sums(gradient).double()], 1) if self.with_zero else found

    def solve(self, moments: Tensor) -> Tensor:
        """Return d [rows, P] with (A + ridge) d = moments, and 0 for rows whose system cannot be solved."""
        diagonal = self.matrix.diagonal(dim1=1, dim2=2)
        root = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
        scaled = self.matrix * root[:, :, None] * root[:, None, :]
        scaled.diagonal(dim1=1, dim2=2).add_(RIDGE + (diagonal <= 0))
        lower, info = torch.linalg.cholesky_ex(scaled)
        found = torch.cholesky_solve((moments * root)[..., None], lower)[..., 0] * root
        return torch.where(((info == 0)[:, None]) & torch.isfinite(found), found, torch.zeros_like(found))

    def rounded_change(self, change: Tensor) -> Tensor:
        """Return the change that is left of `change` [rows, P] when the result is rounded to the stored dtype."""
        moved = (self.theta + change).to(self.stored).double()
        scale = moved[:, : self.groups]
        usable = torch.isfinite(moved).all(1) & (scale.abs() >= torch.finfo(self.stored).smallest_normal).all(1)
        self.moved = torch.where(usable[:, None], moved, self.theta)
        return self.moved - self.theta

    def curvature(self, change: Tensor) -> Tensor:
        """Return d^T A d of every row, [rows]."""
        return ((self.matrix @ change[..., None])[..., 0] * change).sum(1)

    def along(self, change: Tensor, moments: Tensor, own: Tensor) -> tuple[float, float]:
        """Return <gradient, step> and <step, H step> of changing all rows by `change`; own: H_O between these rows."""
        step = change[:, : self.groups].to(self.basis.dtype).repeat_interleave(self.size, 1) * self.basis
        if self.with_zero:
            step += change[:, self.groups :].to(self.basis.dtype).repeat_interleave(self.size, 1)
        bend = ((own @ step) * product(step, self.inputs.whole)).sum(dtype=torch.float64)
        return (moments * change).sum().item(), bend.item()

    def apply(self, scale: Tensor, zero_point: Tensor | None, rows: Tensor) -> None:
        """Store what `rounded_change` came to, in the rows [rows] that are named."""
        new = torch.where(rows[:, None], self.moved, self.theta)
        scale[self.part] = new[:, : self.groups].to(scale.dtype)
        if self.with_zero and zero_point is not None:
            zero_point[self.part] = new[:, self.groups :].to(zero_point.dtype)
