"""The second phase of a product that was cut along K: add the parts up, always in the same order.

Cutting K keeps every multiprocessor busy where N alone gives too few tiles. Each cut writes its fp32 sums into a workspace of its
own, and this kernel adds them from the first cut to the last. Atomic additions would save the launch and cost the order: the same
input would then give other bits from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def add_parts(parts: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """Write the sum of `parts` and the bias into y, rounded once.

    Args:
        parts: fp32 [cuts, M, N], contiguous.
        bias: [N] or None.
        y: [M, N], contiguous.
    """
    cuts, _, n = parts.shape
    numel = y.numel()
    grid = (triton.cdiv(numel, _BLOCK),)
    _add_parts[grid](parts, parts if bias is None else bias, y, numel, n, cuts, bias is not None, _BLOCK)


@triton.jit
def _add_parts(parts, bias, y, numel, n, CUTS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    total = tl.load(parts + offsets, mask=inside, other=0.0)
    for cut in tl.static_range(1, CUTS):
        total += tl.load(parts + cut * numel.to(tl.int64) + offsets, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + offsets % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + offsets, total.to(y.dtype.element_ty), mask=inside)
