"""Matrix products that need no more than eight bits of their operands: in bf16, with fp32 sums, where that is faster.

What calibration and rounding multiply are statistics of a sample and errors that are about to be rounded again. An operand in
bf16 is off by at most 2^-9 of itself, each number on its own, so a sum over K of them is off by about 2^-10 of what terms of
random signs add up to. That is far below what the sample itself leaves open (one over the root of the tokens), and below the
step of a grid. Hardware that multiplies bf16 natively does so at twice the speed of fp32 (AVX-512 BF16), or sixteen times
(tensor cores).

Sums whose differences matter stay in fp32 or fp64: Hessians, factorisations, and whatever decides between two small losses of
one row. Small products stay in fp32 too, as they cost nothing: a result then depends on the machine no more than fp32 sums do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from llmq.ops.features import has_bf16_dot

LEAST_INNER = 1024
"""Numbers that are summed for one element of a product: with fewer it stays in fp32."""


def is_narrow(inner: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of `dtype` over `inner` numbers are computed in bf16 on this device."""
    if dtype != torch.float32 or inner < LEAST_INNER:
        return False
    return device.type != "cpu" or has_bf16_dot()


def narrowed(matrix: Tensor, inner: int) -> Tensor:
    """Return an operand [.., ..] as `product` takes it: in bf16 where that is how it multiplies, else the matrix itself."""
    return matrix.to(torch.bfloat16) if is_narrow(inner, matrix.dtype, matrix.device) else matrix


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left [M, K] @ right [K, N] in fp32 (fp64 where the operands are), each operand narrowed or not."""
    inner = left.shape[1]
    if torch.bfloat16 in (left.dtype, right.dtype) or is_narrow(inner, left.dtype, left.device):
        return (left.to(torch.bfloat16) @ right.to(torch.bfloat16)).float()
    return left @ right


def narrow_passes(width: int, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which linears and attention of a block of hidden size `width` compute in bf16, where that is faster.

    Parameters stay in fp32, and so do norms and the residual stream.
    """
    if is_narrow(width, torch.float32, device):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
