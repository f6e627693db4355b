"""Two-sided feedback: GPTQ's rounding when rows are coupled as well (Tseng et al., arXiv:2505.22988, section 3.2).

With H_I = U D U^T (columns in the order in which they are rounded, U unit upper triangular) and H_O = V C V^T likewise for rows,

    tr(H_O E H_I E^T) = sum over i, j of  C_i D_j Z_ij^2,      Z = V^T E U,

so entry (i, j) is rounded where Z_ij would be 0: at W_ij plus what the errors of rows before i and columns before j, which are
fixed by then, make of it. Then Z_ij is what was rounded away. An entry needs those left of it and those above it, so all entries
of an anti-diagonal are rounded at once: in tiles, with matrix products for everything outside of the tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.algorithms.columns import ColumnGrid
from llmq.algorithms.gptq import Factor
from llmq.algorithms.refit import Scales
from llmq.numerics.grid import IntGrid

TILE = 64
"""Rows and columns of a tile."""


def two_sided(target: Tensor, scales: Scales, grid: IntGrid, inputs: Factor, outputs: Factor) -> Tensor:
    """Round a weight under H_O (x) H_I.

    Args:
        target: [N, K] fp32 or fp64; everything is computed in its dtype.
        scales: scale and zero point [N, groups], as they are stored.
        grid: the integer grid.
        inputs: factor of H_I [K, K]; see `gptq.factorise`.
        outputs: factor of H_O [N, N].

    Returns:
        Codes [N, K].
    """
    dtype, device = target.dtype, target.device
    n, k = target.shape
    rows, columns = outputs.order, inputs.order
    group = columns // (k // scales[0].shape[1])
    wanted = target[rows][:, columns]
    row_scales = (scales[0][rows], None if scales[1] is None else scales[1][rows])
    scale, zero_point = (None if part is None else part.to(dtype) for part in row_scales)
    assert scale is not None
    upper, left = inputs.unit_upper.to(dtype), outputs.unit_upper.to(dtype)
    error = torch.zeros(n, k, dtype=dtype, device=device)
    half = torch.zeros(n, k, dtype=dtype, device=device)  # E U: of finished columns of tiles
    codes = torch.empty(n, k, dtype=dtype, device=device)
    for j in range(0, k, TILE):
        js = slice(j, min(j + TILE, k))
        half[:, js] = 0
        tile_scale = scale[:, group[js]]
        tile_zero = None if zero_point is None else zero_point[:, group[js]]
        before = error[:, :j] @ upper[:j, js]  # what earlier columns bring to E U, for all rows
        for i in range(0, n, TILE):
            rows_ = slice(i, min(i + TILE, n))
            above = left[:i, rows_].t() @ half[:i, js]  # of V^T (E U)
            part = _Tile(wanted[rows_, js], before[rows_], above, upper[js, js], left[rows_, rows_])
            cells = ColumnGrid.of_cells(grid, tile_scale[rows_], None if tile_zero is None else tile_zero[rows_])
            codes[rows_, js], error[rows_, js], half[rows_, js] = part.round(cells)
    found = torch.empty(n, k, dtype=torch.int8 if grid.symmetric else torch.uint8, device=device)
    found[rows[:, None], columns] = codes.to(found.dtype)
    return found


class _Tile:
    """A tile [n, k]: its targets, what everything before it brings to E U and to V^T E U, and its own part of U and V."""

    def __init__(self, wanted: Tensor, before: Tensor, above: Tensor, upper: Tensor, left: Tensor) -> None:
        self.wanted, self.before, self.above, self.upper, self.left = wanted, before, above, upper, left

    def round(self, cells: ColumnGrid) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, errors E, and E U of the tile, all [n, k]."""
        n, k = self.wanted.shape
        codes, error, half = (torch.zeros_like(self.wanted) for _ in range(3))
        by_column, by_row = self.upper.t().contiguous(), self.left.t().contiguous()
        for diagonal in range(n + k - 1):
            first = max(0, diagonal - k + 1)
            i = torch.arange(first, min(diagonal, n - 1) + 1, device=codes.device)
            j = diagonal - i
            # E U without this entry's own error, and V^T of the rows above it: both 0 where nothing is fixed yet
            own = self.before[i, j] + (error[i] * by_column[j]).sum(1)
            total = own + self.above[i, j] + (half.t()[j] * by_row[i]).sum(1)
            found, numbers = cells.nearest_cells(i, j, self.wanted[i, j] + total)
            codes[i, j] = found
            error[i, j] = self.wanted[i, j] - numbers
            half[i, j] = own + error[i, j]
        return codes, error, half
