"""Rotary position embedding (RoFormer, arXiv:2104.09864): the angles, and the rotation, both in fp32.

The halves of a head are paired (dimension i with i + D/2), as in Hugging Face checkpoints; Meta's own files pair
neighbours, and their q and k rows are permuted when they are read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmq.model.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """Return the angle by which each pair turns per position, float32 [D/2] on the CPU, in radians.

    The steps are those of the code that trained the checkpoints, in fp32 as there: at position 10,000 one ulp of a
    frequency is an angle of 1e-3.
    """
    # an explicit device: a model that is built under `torch.device("meta")` needs real numbers here
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert low is not None and high is not None and original is not None  # noqa: PT018  RopeScaling has checked them
    turns = original / (2 * math.pi / frequencies)  # within the context of the first training
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotation_table(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `rotate` multiplies with at `positions`.

    Args:
        frequencies: float32 [D/2], of `inverse_frequencies`, on the device of `positions`.
        positions: integers [T].

    Returns:
        cosines, and sines of which the first half is negated; float32 [T, 1, D] each, where 1 stands for the heads.
    """
    angles = positions.float()[:, None] * frequencies  # [T, D/2]
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat((cosines, cosines), -1)[:, None], torch.cat((-sines, sines), -1)[:, None]


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each pair of `x` [B, T, heads, D] by the angle of its position; returns float32, whatever dtype `x` has.

    (a, b) becomes (a cos - b sin, b cos + a sin). With the halves of `x` swapped and the sign already in `sines`, that is
    three tensor operations, which counts when one token is decoded.
    """
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cosines, swapped, sines)
