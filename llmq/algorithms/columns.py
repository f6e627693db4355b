"""Round one column of a weight at a time, as `numerics.affine` does but without its checks: sequential methods do so K times."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.numerics.grid import IntGrid


class ColumnGrid:
    """The grids of a weight's groups, for columns [N]. Codes are whole numbers in the dtype that is computed in."""

    def __init__(self, grid: IntGrid, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> None:
        """Take scale and zero point [N, groups] as they are stored."""
        self.lowest_code, self.highest_code, self.mid = grid.qmin, grid.qmax, grid.mid
        self.floating = grid.zero_point == "float"
        self.scale = list(scale.t().to(dtype).contiguous())
        self.zero_point = None if zero_point is None else list(zero_point.t().to(dtype).contiguous())
        # the same operations in the same order as in numerics.affine, so that the codes are the same to the bit
        self.inverse = [1.0 / s for s in self.scale]
        self.lowest = [z - s * float(grid.mid) for s, z in zip(self.scale, self.zero_point or [], strict=False)]

    def nearest(self, group: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes nearest to `wanted` [N] in a group, and the numbers they mean, both [N] of its dtype."""
        scale = self.scale[group]
        if self.zero_point is None:
            codes = (wanted * self.inverse[group]).round_().clamp_(self.lowest_code, self.highest_code)
            return codes, codes * scale
        if self.floating:
            codes = ((wanted - self.lowest[group]) / scale).round_().clamp_(self.lowest_code, self.highest_code)
            return codes, ((codes - self.mid) * scale).add_(self.zero_point[group])
        codes = (wanted * self.inverse[group]).round_().add_(self.zero_point[group]).clamp_(self.lowest_code, self.highest_code)
        return codes, (codes - self.zero_point[group]) * scale
