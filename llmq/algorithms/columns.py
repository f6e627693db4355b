"""Round one column of a weight at a time, as `numerics.affine` does but without its checks: sequential methods do so K times."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.numerics.grid import IntGrid


class ColumnGrid:
    """The grids of a weight's groups, for columns [N]. Codes are whole numbers in the dtype that is computed in."""

    def __init__(self, grid: IntGrid, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> None:
        """Take scale and zero point [N, groups] as they are stored."""
        self.grid = grid
        # the same operations in the same order as in numerics.affine, so that the codes are the same to the bit
        self.scale = scale.t().to(dtype).contiguous()
        self.zero_point = None if zero_point is None else zero_point.t().to(dtype).contiguous()
        self.inverse = 1.0 / self.scale
        floating = grid.zero_point == "float"
        self.lowest = self.zero_point - self.scale * float(grid.mid) if floating and self.zero_point is not None else None

    def nearest(self, group: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes nearest to `wanted` [N] in a group, and the numbers they mean, both [N] of its dtype."""
        return self._nearest((group,), wanted)

    def nearest_at(self, group: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same where a weight has one row [1, entries], each with a group of its own: `group` any shape."""
        return self._nearest((group, 0), wanted)

    def _nearest(self, where: tuple[int] | tuple[Tensor, int], wanted: Tensor) -> tuple[Tensor, Tensor]:
        qmin, qmax = self.grid.qmin, self.grid.qmax
        scale = self.scale[where]
        if self.zero_point is None:
            codes = (wanted * self.inverse[where]).round_().clamp_(qmin, qmax)
            return codes, codes * scale
        zero_point = self.zero_point[where]
        if self.lowest is not None:
            codes = ((wanted - self.lowest[where]) / scale).round_().clamp_(qmin, qmax)
            return codes, ((codes - self.grid.mid) * scale).add_(zero_point)
        codes = (wanted * self.inverse[where]).round_().add_(zero_point).clamp_(qmin, qmax)
        return codes, (codes - zero_point) * scale
