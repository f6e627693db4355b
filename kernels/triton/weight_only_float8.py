"""float8 (e4m3) codes x 16-bit activations, one scale a row: y = s[n] * sum_k x[m, k] * q[n, k].

The weight is read as it is stored, [N, K], a byte a code; `weight_only` says how it is cut. A code has four significant bits and
is exact in bfloat16 and float16, which the hardware makes of two codes at once, from Ada on. So the product of several rows is
that of int8 codes, and only that of one row has a kernel of its own: int8's takes bytes for integers.

**One row.** 4.3 10^12 codes a second are 18.5 a clock and multiprocessor of an H200. A conversion to float16 for two codes, one
more to fp32 and one multiplication for each are 2.5 instructions a code of the 6.9 there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .split import add_parts
from .weight_only import Gpu
from .weight_only_int8 import _rows, launch


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, gpu: Gpu) -> torch.Tensor:
    """Return x W^T + bias, [M, N] of x's dtype.

    Args:
        x: bf16 or fp16 [M, K], unit stride in a row.
        weight: float8_e4m3fn [N, K], contiguous.
        scale: [N, 1] of a floating dtype, contiguous.
        bias: [N] or None.
        gpu: where the tensors are.
    """
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n)
    if m == 0:
        return y
    cut = launch(m, n, k, k, gpu)
    parts = x.new_empty(cut.cuts, m, n, dtype=torch.float32) if cut.cuts > 1 else y
    fused = bias is not None and cut.cuts == 1
    tensors = (scale, bias if fused else scale, parts)
    constants = {"HAS_BIAS": fused, "BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k, "num_warps": cut.warps}
    outputs = triton.cdiv(n, cut.block_n)
    if cut.block_m == 1:
        _one_row[outputs, cut.cuts](x, weight, *tensors, n, k, cut.span, **constants)
    else:
        grid = (outputs, triton.cdiv(m, cut.block_m), cut.cuts)
        how = {"GROUP": 0, "BLOCK_M": cut.block_m, "STAGES": cut.stages, **constants}
        _rows[grid](x, weight, *tensors, m, n, k, x.stride(0), cut.span, **how)
    if cut.cuts > 1:
        add_parts(parts, bias, y)
    return y


@triton.jit
def _one_row(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    span,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply one row; a thread's load is 16 codes, and it keeps their sum."""
    LOADS: tl.constexpr = BLOCK_K // 16
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    weight_rows = weight_ptr + row.to(tl.int64)[:, None] * K
    begin = part * span
    end = tl.minimum(begin + span, K)
    total = tl.zeros([BLOCK_N, LOADS], tl.float32)
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        codes = tl.load(weight_rows + k[None, :], mask=(k < end)[None, :], other=0.0).to(tl.float32)
        x = tl.load(x_ptr + k, mask=k < end, other=0.0).to(tl.float32)
        total += tl.sum(tl.reshape(codes * x[None, :], [BLOCK_N, LOADS, 16]), axis=2)
    y = tl.sum(total, axis=1) * tl.load(scale_ptr + row).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(out_ptr + part * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)
