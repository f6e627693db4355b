"""Codes of 2, 3 and 4 bits as the codes of one 4-bit grid, which is what the int4 kernels read.

A grid of fewer bits is part of the 4-bit grid with the same scale and zero point:

* symmetric: the integers q in [-2**(b-1), 2**(b-1) - 1] are integers of [-8, 7];
* `zero_point="int"`: the codes 0 … 2**b - 1 are codes of 0 … 15, and the zero point is the same code;
* `zero_point="float"`: (q - 2**(b-1)) * s + z is (q' - 8) * s + z for q' = q + 8 - 2**(b-1).

So nothing is rounded, and the way back is exact. Four bits a weight are then read where the format stores two or three: an int4
kernel makes such a weight as fast as an int4 one, and no faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import UsageError
from llmq.numerics.grid import Grid, IntGrid
from llmq.numerics.weight import QuantizedWeight

MIDDLE = 8
"""The 4-bit code that means 0 on a symmetric grid, and the zero point itself on one with a floating zero point."""


def is_nibble(grid: Grid) -> bool:
    """Whether codes of the grid are codes of a 4-bit one."""
    return isinstance(grid, IntGrid) and grid.bits <= 4


def nibble_codes(weight: QuantizedWeight) -> Tensor:
    """Return the codes of a weight of 2 to 4 bits as 4-bit ones, uint8 [N, K] in [0, 15], MIDDLE in the middle.

    Raises:
        UsageError: when the weight has more bits, or none.
    """
    grid = _nibble_grid(weight.grid)
    codes = weight.codes()
    offset = _offset(grid)
    return (codes + offset).to(torch.uint8) if offset else codes


def from_nibbles(grid: IntGrid, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> QuantizedWeight:
    """Inverse of `nibble_codes`: codes uint8 [N, K] in [0, 15], scale and zero point as `QuantizedWeight` has them."""
    own = codes.to(torch.int8 if _nibble_grid(grid).symmetric else torch.uint8) - _offset(grid)
    return QuantizedWeight.from_codes(grid, own, scale, zero_point)


def _nibble_grid(grid: Grid) -> IntGrid:
    if not isinstance(grid, IntGrid) or not is_nibble(grid):
        raise UsageError(f"weights of 2 to 4 bits have 4-bit codes, got {grid}; use another kernel.")
    return grid


def _offset(grid: IntGrid) -> int:
    """What a 4-bit code is above the grid's own."""
    if grid.zero_point == "int":
        return 0
    return MIDDLE if grid.symmetric else MIDDLE - grid.mid
