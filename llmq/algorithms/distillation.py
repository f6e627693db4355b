"""Scales and zero points as trained numbers: distillation with the codes frozen (DWQ of mlx-lm; EfficientQAT, arXiv:2407.11062).

The loss is the divergence of the quantized model from the original, T^2 KL(p_T || q_T) at temperature T (Hinton et al.,
arXiv:1503.02531), and only what multiplies codes is trained. Each trained number has a master in fp32; the model computes with
its rounding to the dtype that is stored, and the rounding's gradient is taken for 1 (straight through).

Masters are relative, so that one learning rate fits all: with codes q, mid = 2^(bits-1) for a floating zero point,

    scale = s0 (1 + a),    zero point = z0 + s0 b,    norm = w0 (1 + c),    a = b = c = 0 at the start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import UsageError
from llmq.numerics.grid import IntGrid
from llmq.numerics.weight import QuantizedWeight


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the sum over rows of T^2 KL(softmax(teacher / T) || softmax(student / T)), a scalar.

    Args:
        student: logits [R, V] that may require a gradient.
        teacher: logits [R, V].
        temperature: T, positive.
    """
    p = (teacher.detach() / temperature).log_softmax(-1)
    q = (student / temperature).log_softmax(-1)
    return (p.exp() * (p - q)).sum() * temperature**2


class TrainedVector:
    """A norm's weight that is trained: what is stored, w0 (1 + c), and the gradient by c."""

    def __init__(self, stored: Tensor) -> None:
        """Start from what is stored, [hidden] of any floating dtype."""
        self.dtype = stored.dtype
        self.start = stored.detach().float()
        self.change = torch.zeros_like(self.start)

    def value(self) -> Tensor:
        """Return it as it is stored, in its dtype."""
        return (self.start * (1 + self.change)).to(self.dtype)

    def gradient(self, by_value: Tensor) -> Tensor:
        """Return the gradient by `change`, given that by the value."""
        return by_value * self.start


class TrainedGrid:
    """The scales and zero points of one quantized weight while they are trained.

    Integer zero points are codes, and frozen like them.

    Attributes:
        scale_change: a [N, groups] fp32.
        zero_change: b [N, groups] fp32; None where there is no floating zero point.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        """Start from a quantized weight; raises UsageError when it is on a float grid."""
        if not isinstance(weight.grid, IntGrid) or weight.scale is None:
            raise UsageError("only weights on an integer grid have scales to train.")
        self.grid = weight.grid
        self.scale = weight.scale.float()
        self.zero = weight.zero_point.float() if weight.zero_point is not None and self.grid.zero_point == "float" else None
        self.scale_change = torch.zeros_like(self.scale)
        self.zero_change = None if self.zero is None else torch.zeros_like(self.zero)

    def apply(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Return `weight`'s codes with the scales and zero points as they are now, rounded to their dtypes."""
        assert weight.scale is not None
        scale = (self.scale * (1 + self.scale_change)).to(weight.scale.dtype)
        zero_point = weight.zero_point
        if self.zero is not None and self.zero_change is not None:
            zero_point = (self.zero + self.scale * self.zero_change).to(weight.scale.dtype)
        return QuantizedWeight(self.grid, weight.shape, weight.qdata, scale, zero_point)

    def gradients(self, weight: QuantizedWeight, by_weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients by `scale_change` and `zero_change`.

        Args:
            weight: whose codes they scale.
            by_weight: [N, K] gradient by the numbers that the codes mean.
        """
        n, k = weight.shape
        groups = self.scale.shape[1]
        codes = weight.codes().to(by_weight.dtype).view(n, groups, k // groups)
        by_group = by_weight.view(n, groups, k // groups)
        offset: Tensor | float = 0.0
        if self.grid.zero_point == "float":
            offset = float(self.grid.mid)
        elif weight.zero_point is not None:
            offset = weight.zero_point.to(by_weight.dtype)[..., None]
        by_scale = ((codes - offset) * by_group).sum(-1) * self.scale
        return by_scale, None if self.zero is None else by_group.sum(-1) * self.scale

    def masters(self) -> list[Tensor]:
        """Return the trained tensors, scales first."""
        return [self.scale_change] if self.zero_change is None else [self.scale_change, self.zero_change]
