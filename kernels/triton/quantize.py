"""Activations to int8 codes, a scale a row and, asymmetric, a zero point: for products that quantize x before or themselves.

The arithmetic is that of llmq/ops/reference.py, operation by operation where the codes are made: IEEE division for the scale and
for its reciprocal, and rounding to nearest, ties to even. Codes are therefore equal bit for bit. A row with a NaN or an infinity
gets the scale NaN, which makes the row of the result NaN whatever its codes are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SCAN = 4096
"""Elements of x that a program looks at together, 32 a thread."""

_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2**23: between 2**23 and 2**24 fp32 holds the integers and nothing else
_INFINITY_BITS = tl.constexpr(0x7F800000)


def quantize(
    x: torch.Tensor, input_scale: torch.Tensor | None, eps: float, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize the rows of x as llmq/ops/reference.py does.

    Args:
        x: [M, K] of fp32, bf16 or fp16, any strides; M > 0.
        input_scale: fp32 [1], the scale of all rows, or None.
        eps: smallest scale that a row finds for itself.
        symmetric: codes of [-127, 127], else of [-128, 127] and a zero point.

    Returns:
        codes int8 [M, K], scales fp32 [M], zero points int32 [M] or None.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    m, k = x.shape
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    zero = None if symmetric else torch.empty(m, dtype=torch.int32, device=x.device)
    static = input_scale is not None
    scan = min(triton.next_power_of_2(k), SCAN)
    block_m = min(triton.next_power_of_2(m), SCAN // scan)
    _quantize_rows[(triton.cdiv(m, block_m),)](
        x, input_scale if static else scale, codes, scale, scale if symmetric else zero, m, k, x.stride(0), eps,
        SYMMETRIC=symmetric, STATIC=static, BLOCK_M=block_m, SCAN=scan, num_warps=4,
    )  # fmt: skip
    return codes, scale, zero


@triton.jit
def scan_rows(x_ptr, rows, M, K, stride, BLOCK_M: tl.constexpr, SCAN: tl.constexpr):
    """Return the smallest and the largest finite element of rows of x, 0 among them, and the bits of the largest magnitude.

    As int32, the bits of fp32 magnitudes are ordered as the numbers are, and what is not finite lies from `_INFINITY_BITS` on.
    """
    lowest = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.zeros([BLOCK_M], tl.float32)
    bits = tl.zeros([BLOCK_M], tl.int32)
    offsets = rows.to(tl.int64)[:, None] * stride
    for start in range(0, K, SCAN):
        ks = start + tl.arange(0, SCAN)
        x = tl.load(x_ptr + offsets + ks[None, :], mask=(rows[:, None] < M) & (ks[None, :] < K), other=0.0).to(tl.float32)
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        x = tl.where(magnitude < _INFINITY_BITS, x, 0.0)
        lowest = tl.minimum(lowest, tl.min(x, axis=1))
        highest = tl.maximum(highest, tl.max(x, axis=1))
        bits = tl.maximum(bits, tl.max(magnitude, axis=1))
    return lowest, highest, bits


@triton.jit
def row_grid(lowest, highest, bits, input_scale_ptr, eps, SYMMETRIC: tl.constexpr, STATIC: tl.constexpr):
    """Return the scale of each row, NaN where it is not finite, what its elements are multiplied with, and its zero point."""
    zero = tl.zeros_like(lowest)
    if STATIC:
        scale = tl.load(input_scale_ptr) + zero
    elif SYMMETRIC:
        scale = tl.maximum(tl.div_rn(tl.maximum(-lowest, highest), zero + 127.0), eps)
    else:
        scale = tl.maximum(tl.div_rn(highest - lowest, zero + 255.0), eps)
        steps = tl.div_rn(lowest, scale)
        zero = tl.minimum(tl.maximum(-128.0 - ((steps + _NEAREST) - _NEAREST), -128.0), 127.0)
    inverse = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
    inverse = tl.where((inverse.to(tl.int32, bitcast=True) & 0x7FFFFFFF) == _INFINITY_BITS, 0.0, inverse)
    return tl.where(bits < _INFINITY_BITS, scale, float("nan")), inverse, zero


@triton.jit
def encode(x, inverse, zero, SYMMETRIC: tl.constexpr):
    """Return the int8 codes of fp32 x; 0 for what is not finite, whose row has the scale NaN.

    The first clamp keeps within reach of `_NEAREST` what lies far beyond a static scale, and changes no code.
    """
    x = tl.where((x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < _INFINITY_BITS, x, 0.0)
    steps = tl.minimum(tl.maximum(x * inverse, -1024.0), 1024.0)
    codes = ((steps + _NEAREST) - _NEAREST) + zero
    return tl.minimum(tl.maximum(codes, -127.0 if SYMMETRIC else -128.0), 127.0).to(tl.int8)


@triton.jit
def _quantize_rows(
    x_ptr,
    input_scale_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    M,
    K,
    stride,
    eps,
    SYMMETRIC: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Quantize BLOCK_M rows of x [M, K] to int8; the second reading of a row comes from the cache.

    Args:
        x_ptr: fp32, bf16 or fp16 [M, K], rows `stride` elements apart, elements of a row adjacent.
        input_scale_ptr: fp32 [1], the scale of all rows where STATIC.
        codes_ptr: int8 [M, K].
        scale_ptr: fp32 [M].
        zero_ptr: int32 [M], not written where SYMMETRIC.
        M: rows.
        K: inputs.
        stride: elements from row to row of x.
        eps: smallest scale of a dynamic grid.
        SYMMETRIC: codes of [-127, 127] and no zero point, else [-128, 127] and one.
        STATIC: the scale is given.
        BLOCK_M: rows of a program.
        SCAN: inputs at a time.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lowest, highest, bits = scan_rows(x_ptr, rows, M, K, stride, BLOCK_M, SCAN)
    scale, inverse, zero = row_grid(lowest, highest, bits, input_scale_ptr, eps, SYMMETRIC, STATIC)
    tl.store(scale_ptr + rows, scale, mask=rows < M)
    if not SYMMETRIC:
        tl.store(zero_ptr + rows, zero.to(tl.int32), mask=rows < M)
    offsets = rows.to(tl.int64)[:, None]
    for start in range(0, K, SCAN):
        ks = start + tl.arange(0, SCAN)
        inside = (rows[:, None] < M) & (ks[None, :] < K)
        x = tl.load(x_ptr + offsets * stride + ks[None, :], mask=inside, other=0.0).to(tl.float32)
        codes = encode(x, inverse[:, None], zero[:, None], SYMMETRIC)
        tl.store(codes_ptr + offsets * K + ks[None, :], codes, mask=inside)
