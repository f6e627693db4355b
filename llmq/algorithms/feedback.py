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
    # whole tiles only: what is added lies on a grid point of its own, and no feedback reaches or leaves it
    height, width = -(-n // TILE) * TILE, -(-k // TILE) * TILE
    wanted = _padded(target[rows][:, columns], (height, width), 0.0)
    scale = _padded(scales[0][rows][:, group].to(dtype), (height, width), 1.0)
    zero_point = None if scales[1] is None else _padded(scales[1][rows][:, group].to(dtype), (height, width), 0.0)
    upper, left = (_identity_padded(factor.unit_upper.to(dtype), size) for factor, size in ((inputs, width), (outputs, height)))
    error, half, codes = (torch.zeros(height, width, dtype=dtype, device=device) for _ in range(3))  # half: E U
    down, right = height // TILE, width // TILE
    for diagonal in range(down + right - 1):
        across = range(max(0, diagonal - right + 1), min(diagonal, down - 1) + 1)
        tiles = [(_span(a), _span(diagonal - a)) for a in across]
        # of E U, what columns of earlier tiles bring; of V^T E U, what rows of earlier tiles do
        before = torch.stack([error[i, : j.start] @ upper[: j.start, j] for i, j in tiles])
        above = torch.stack([left[: i.start, i].t() @ half[: i.start, j] for i, j in tiles])
        cells = _Cells(grid, *(_stacked(part, tiles) for part in (wanted, scale, zero_point)))
        own = torch.stack([upper[j, j].t() for _, j in tiles]), torch.stack([left[i, i].t() for i, _ in tiles])
        found = _round_tiles(cells, before, above, own)
        for number, tile in enumerate(tiles):
            for whole, part in zip((codes, error, half), found, strict=True):
                whole[tile] = part[number]
    result = torch.empty(n, k, dtype=torch.int8 if grid.symmetric else torch.uint8, device=device)
    result[rows[:, None], columns] = codes[:n, :k].to(result.dtype)
    return result


class _Cells:
    """Entries of some tiles [m, TILE, TILE], each with its own scale and zero point."""

    def __init__(self, grid: IntGrid, wanted: Tensor | None, scale: Tensor | None, zero_point: Tensor | None) -> None:
        assert wanted is not None
        assert scale is not None
        self.wanted, self.shape = wanted, wanted.shape
        self.entries = ColumnGrid(grid, scale.view(1, -1), None if zero_point is None else zero_point.view(1, -1), wanted.dtype)

    def nearest(self, where: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and numbers nearest to `values` at the flat positions `where`, both of the same shape."""
        return self.entries.nearest_at(where, values)


def _round_tiles(cells: _Cells, before: Tensor, above: Tensor, own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Round tiles that do not need each other, anti-diagonal by anti-diagonal.

    Args:
        cells: what is wanted, and the grids.
        before: [m, TILE, TILE], what columns before the tile bring to E U.
        above: [m, TILE, TILE], what rows above the tile bring to V^T E U.
        own: U^T and V^T between the tile's own columns and rows.

    Returns:
        Codes, errors E, and E U, all [m, TILE, TILE].
    """
    by_column, by_row = own
    codes, error, half = (torch.zeros_like(cells.wanted) for _ in range(3))
    half_columns = half.transpose(1, 2)
    offset = torch.arange(len(before), device=before.device)[:, None] * TILE * TILE
    flat_codes, flat_error, flat_half = (part.view(-1) for part in (codes, error, half))
    for diagonal in range(2 * TILE - 1):
        i = torch.arange(max(0, diagonal - TILE + 1), min(diagonal, TILE - 1) + 1, device=before.device)
        j = diagonal - i
        where = offset + i * TILE + j
        # entries that are not fixed yet are 0 in `error` and `half`
        mine = before[:, i, j] + (error[:, i] * by_column[:, j]).sum(-1)
        total = mine + above[:, i, j] + (half_columns[:, j] * by_row[:, i]).sum(-1)
        wanted = cells.wanted[:, i, j]
        found, numbers = cells.nearest(where, wanted + total)
        flat_codes[where] = found
        flat_error[where] = wanted - numbers
        flat_half[where] = mine + wanted - numbers
    return codes, error, half


def _span(tile: int) -> slice:
    return slice(tile * TILE, (tile + 1) * TILE)


def _stacked(whole: Tensor | None, tiles: list[tuple[slice, slice]]) -> Tensor | None:
    return None if whole is None else torch.stack([whole[tile] for tile in tiles])


def _padded(matrix: Tensor, shape: tuple[int, int], value: float) -> Tensor:
    result = matrix.new_full(shape, value)
    result[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result


def _identity_padded(matrix: Tensor, size: int) -> Tensor:
    result = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    result[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result
