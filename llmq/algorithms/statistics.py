"""What an algorithm may know of one linear besides its weight."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto

from torch import Tensor


class Needs(Flag):
    """What has to be gathered before a weight can be quantized; what nobody needs is not computed."""

    NONE = 0
    INPUTS = auto()
    """`Statistics.hessian`."""
    UPSTREAM = auto()
    """`Statistics.upstream`: the original model's activations go through the original blocks beside the quantized ones."""
    FISHER = auto()
    """`Statistics.input_factor` and `output_factor`: a backward pass through the original model."""
    TARGETS = auto()
    """The original block's outputs, which block-wise learning aims at."""

    @property
    def calibration(self) -> bool:
        """Whether calibration text is needed at all."""
        return self is not Needs.NONE


@dataclass(frozen=True, slots=True)
class Statistics:
    """Second moments around one linear with weight [N, K]; fp32 (or fp64), on the weight's device.

    Attributes:
        hessian: H [K, K] = 2/n sum x_q^T x_q over the n inputs x_q [1, K] that the quantized blocks before it produce.
        upstream: [K, K] = 2/n sum (x_f - x_q)^T x_q, with x_f the input at the same place of the original model.
        input_factor: H_I [K, K] of the Fisher information H_O (x) H_I of the weight, from the original model.
        output_factor: H_O [N, N].
    """

    hessian: Tensor
    upstream: Tensor | None = None
    input_factor: Tensor | None = None
    output_factor: Tensor | None = None
