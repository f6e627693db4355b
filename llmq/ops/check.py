"""How far a kernel may be from the exact result, derived and not chosen: used by the start-up self-test and by the tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from llmq.numerics.grid import IntGrid
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.reference import quantize_activation
from llmq.ops.schema import Case, Kernel

_UNIT_FP32 = 2.0**-24
_BLOCK = 256
"""Most inputs that share a step in `native`'s 16-bit block floating point."""
_LARGEST_CODE = 32639
_LEAST_STEP = 2.0**-126
"""Of the same: the largest code, and the step below which none goes."""
_HALF_SUBNORMAL = 2.0**-150
"""Half of fp32's smallest number: what a product below the normal numbers may be off by, however small it is."""


@dataclass(frozen=True, eq=False)
class Exact:
    """The result in fp64 [M, N], and the largest distance from it that rounding explains, element by element."""

    y: Tensor
    bound: Tensor


def exact_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, case: Case) -> Exact:
    """Compute x W^T + bias in fp64 from the same rounded inputs, with its error bound.

    A sum of K + c fp32 operations on terms t has an error of at most gamma(K + c) * sum |t|, gamma(n) = n u / (1 - n u),
    u = 2**-24 (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.5), in whatever order it is summed; c
    counts the scalings and the bias. Rounding to the result's dtype adds half an ulp of the result, and kernels that round
    before they add the bias add half an ulp of what they rounded.

    Where bf16 activations meet integer weights, kernels may take x as 16-bit block floating point (`native`): the inputs of a
    group, at most 256 at a time, share the least power of two as a step with which no code is above 32639, but none below
    2**-126. Each is off by at most half a step: 1/32639.5 of the block's largest, or 2**-127.

    A product of fp32 numbers that lies below the normal ones is off by up to 2**-150 instead of u times itself. With scales as
    small as that, each of the K products of a code and a scale may be (what is then multiplied by x), or of a scale and a step
    (by a sum of products of codes, each below 2**23).

    Args:
        x: [M, K] of `case.dtype`.
        weight: [N, K].
        bias: [N] or None.
        case: format and dtype.
    """
    w = weight.dequantize(torch.float64)
    if case.format.activation is None:
        activations = x.double()
    else:
        codes, scale = quantize_activation(x, case.format.activation, weight.input_scale)
        activations = codes.double() * scale.double()
    product = activations @ w.T
    y = product if bias is None else product + bias.double()
    terms = activations.abs() @ _magnitude(weight).T + (0 if bias is None else bias.double().abs())
    half_ulp = torch.finfo(case.dtype).eps / 2
    bound = _gamma(case.k + 8) * terms + half_ulp * (1 + 2 * _UNIT_FP32) * (y.abs() + (0 if bias is None else product.abs()))
    if case.format.activation is None and case.dtype == torch.bfloat16 and isinstance(weight.grid, IntGrid):
        bound = bound + _block_terms(activations, w, weight.grid)
    bound = bound + torch.finfo(case.dtype).smallest_normal * half_ulp  # subnormal results
    if case.format.quantized:
        bound = bound + _HALF_SUBNORMAL * (2 * activations.abs().sum(dim=1, keepdim=True) + 2**23 * case.k)
    return Exact(y, bound)


@runtime_checkable
class Coarse(Protocol):
    """A kernel whose sums are not those of fp32 numbers, and which says how far that may take it."""

    def slack(self, x: Tensor, weight: QuantizedWeight, case: Case) -> Tensor:
        """Return what is added to `exact_linear`'s bound for this kernel alone, fp64 [M, N]."""
        ...


def exact_for(kernel: Kernel, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, case: Case) -> Exact:
    """Return `exact_linear`, with the kernel's own bound where it has one."""
    exact = exact_linear(x, weight, bias, case)
    return replace(exact, bound=exact.bound + kernel.slack(x, weight, case)) if isinstance(kernel, Coarse) else exact


def worst_element(got: Tensor, exact: Exact) -> str | None:
    """Return where and by how much `got` leaves the bound, or None when it is within it everywhere.

    Args:
        got: [M, N], finite where the exact result is.
        exact: what it should be.
    """
    error = (got.double() - exact.y).abs()
    outside = ~(error <= exact.bound)  # a NaN is outside
    if not bool(outside.any()):
        return None
    excess = torch.where(outside, torch.nan_to_num(error / exact.bound, nan=torch.inf), torch.zeros_like(error))
    m, n = divmod(int(excess.argmax()), got.shape[1])
    columns = outside.any(dim=0).nonzero().flatten()[:8].tolist()
    rows = outside.any(dim=1).nonzero().flatten()[:8].tolist()
    value, expected, bound = got[m, n].item(), exact.y[m, n].item(), exact.bound[m, n].item()
    return (
        f"element ({m}, {n}) is {value:.9g} where {expected:.9g} +- {bound:.3g} was expected; "
        f"{outside.double().mean().item():.1%} of {list(got.shape)} are outside, first rows {rows}, columns {columns}"
    )


def _block_terms(x: Tensor, w: Tensor, grid: IntGrid) -> Tensor:
    """Return the sum over blocks of inputs of (most that rounding moves one of x) * (sum of |w|), fp64 [M, N]."""
    k = x.shape[1]
    group = grid.group_size or k
    terms = x.new_zeros(x.shape[0], w.shape[0])
    for begin in range(0, k, group):
        for start in range(begin, begin + group, _BLOCK):
            stop = min(start + _BLOCK, begin + group)
            # With half the step the largest code would not fit: largest / (step / 2) >= 32639.5.
            half_step = (x[:, start:stop].abs().amax(dim=1, keepdim=True) / (_LARGEST_CODE + 0.5)).clamp(min=_LEAST_STEP / 2)
            terms += half_step * w[:, start:stop].abs().sum(dim=1)
    return terms


def _magnitude(weight: QuantizedWeight) -> Tensor:
    """Return the sum of the magnitudes of the terms a weight is computed from, fp64 [N, K]."""
    grid = weight.grid
    if isinstance(grid, IntGrid) and grid.zero_point != "none":
        return _asymmetric_magnitude(weight, grid)
    return weight.dequantize(torch.float64).abs()


def _asymmetric_magnitude(weight: QuantizedWeight, grid: IntGrid) -> Tensor:
    assert weight.scale is not None
    assert weight.zero_point is not None
    n, k = weight.shape
    scale, zero = weight.scale.double().unsqueeze(2), weight.zero_point.double().unsqueeze(2)
    codes = weight.codes().double().reshape(n, grid.groups(k), -1)
    terms = (codes + zero) * scale.abs() if grid.zero_point == "int" else (codes - grid.mid).abs() * scale.abs() + zero.abs()
    return terms.reshape(n, k)


def _gamma(operations: int) -> float:
    return operations * _UNIT_FP32 / (1 - operations * _UNIT_FP32)
