"""int8 codes x 16-bit activations, one scale a row or a group of inputs: y = sum_g s[n, g] * sum_k x[m, k] * q[n, k].

The weight is read as it is stored, [N, K]; `weight_only` says how it is cut, and what is exact.

**One row.** At 4.3 TB/s 4.3 10^12 codes arrive in a second, and an H200 issues 29.7 10^12 instructions (132 multiprocessors x 128
lanes x 1.76 GHz), 6.9 a code. Conversions from integers are fewer, 16 a clock and multiprocessor, which is 3.7 10^12; so none is
used, and a byte becomes a number by lying in the mantissa of 2^23: about 5 instructions a code, with everything else.

**Rows.** Triton turns bytes into bfloat16 much the same way. They are loaded four in a word, because shared memory gives words to
registers faster than bytes: about 4.5 instructions a code. A weight whose rows do not begin on 16 bytes is loaded byte by byte,
for one row, too.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .split import add_parts
from .weight_only import LANE_BYTES, Gpu, Launch, one_row, rows_by_tiles

GROUP_MULTIPLE = LANE_BYTES
"""Groups of several a row are of a multiple of as many inputs."""
_STEP = 128
_STEP_OF_MANY_ROWS = 64


def launch(rows: int, n: int, k: int, group: int, gpu: Gpu) -> Launch:
    """Return how a product [rows, k] x [n, k] with groups of `group` inputs is cut."""
    if rows == 1:
        return one_row(n, k, 8, gpu)
    longest = _STEP if rows <= 64 else _STEP_OF_MANY_ROWS
    step = min(longest, max(16, 1 << (k - 1).bit_length())) if group == k else math.gcd(group, longest)
    return rows_by_tiles(rows, n, k, step, 8, gpu)


def linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, gpu: Gpu) -> torch.Tensor:
    """Return x W^T + bias, [M, N] of x's dtype.

    Args:
        x: bf16 or fp16 [M, K], unit stride in a row.
        weight: int8 [N, K], contiguous.
        scale: [N, G] of a floating dtype, contiguous.
        bias: [N] or None.
        gpu: where the tensors are.
    """
    (m, k), n, groups = x.shape, weight.shape[0], scale.shape[1]
    y = x.new_empty(m, n)
    if m == 0:
        return y
    by_words = k % LANE_BYTES == 0 and weight.data_ptr() % LANE_BYTES == 0
    cut = launch(m if by_words else max(m, 2), n, k, k // groups, gpu)
    codes = weight.view(torch.int32) if by_words else weight
    parts = x.new_empty(cut.cuts, m, n, dtype=torch.float32) if cut.cuts > 1 else y
    fused = bias is not None and cut.cuts == 1
    tensors = (scale, bias if fused else scale, parts)
    constants = {
        "GROUP": k // groups if groups > 1 else 0,
        "HAS_BIAS": fused,
        "BLOCK_N": cut.block_n,
        "BLOCK_K": cut.block_k,
        "num_warps": cut.warps,
    }
    outputs = triton.cdiv(n, cut.block_n)
    if cut.block_m == 1:
        _one_row[outputs, cut.cuts](x, codes, *tensors, n, k, cut.span, **constants)
    else:
        grid = (outputs, triton.cdiv(m, cut.block_m), cut.cuts)
        stride = x.stride(0)
        _rows[grid](x, codes, *tensors, m, n, k, stride, cut.span, BLOCK_M=cut.block_m, STAGES=cut.stages, **constants)
    if cut.cuts > 1:
        add_parts(parts, bias, y)
    return y


@triton.jit
def _byte(words, INDEX: tl.constexpr):
    """Return a byte of each word as a number: in the mantissa of 2^23 it is 2^23 + 128 + q."""
    return (((words >> 8 * INDEX) & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _one_row(
    x_ptr,
    words_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    span,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply one row; a thread's load is 4 words, 16 codes, whose sum is scaled where groups are of several a row."""
    LOADS: tl.constexpr = BLOCK_K // 16
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    begin = part * span // 16
    end = tl.minimum(begin + span // 16, K // 16)
    total = tl.zeros([BLOCK_N, LOADS], tl.float32)
    for start in range(begin, end, LOADS):
        load = start + tl.arange(0, LOADS)
        inside = load < end
        where = (row.to(tl.int64)[:, None] * (K // 16) + load[None, :]) * 4
        words = tl.load(words_ptr + (where[:, :, None] + tl.arange(0, 4)[None, None, :]), mask=inside[None, :, None], other=0)
        x = tl.load(x_ptr + (load[:, None] * 16 + tl.arange(0, 16)[None, :]), mask=inside[:, None], other=0.0)
        even, odd = tl.split(tl.reshape(x.to(tl.float32), [LOADS, 4, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        sums = _byte(words, 0) * x0[None, :, :] + _byte(words, 1) * x1[None, :, :]
        sums += _byte(words, 2) * x2[None, :, :]
        sums += _byte(words, 3) * x3[None, :, :]
        load_sums = tl.sum(sums, axis=2)
        if GROUP > 0:
            groups = row[:, None] * (K // GROUP) + (load * 16 // GROUP)[None, :]
            load_sums *= tl.load(scale_ptr + groups, mask=inside[None, :], other=0.0).to(tl.float32)
        total += load_sums
    y = tl.sum(total, axis=1)
    if GROUP == 0:
        y *= tl.load(scale_ptr + row).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(out_ptr + part * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _four_bytes(words):
    """Return the bytes of words [BLOCK_N, BLOCK_K / 4] as int8 [BLOCK_N, BLOCK_K], in order."""
    even = tl.interleave(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.interleave((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.interleave(even, odd)


@triton.jit
def _rows(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    x_stride,
    span,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply a tile of rows by a tile of outputs; a step lies within a group. The weight comes as bytes or as words of four."""
    part = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(n, N - 1)
    by_words: tl.constexpr = weight_ptr.dtype.element_ty == tl.int32
    weight_rows = weight_ptr + row.to(tl.int64)[:, None] * (K // 16 * 4 if by_words else K)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_stride
    begin = part * span
    end = tl.minimum(begin + span, K)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < end)[None, :]
        if by_words:
            word = tl.arange(0, BLOCK_K // 4)
            within = start // 16 + word // 4 < end // 16  # true or false for four words at once, so that they are one load
            words = tl.load(weight_rows + (start // 16 * 4 + word)[None, :], mask=within[None, :], other=0)
            codes = _four_bytes(words)
        else:
            codes = tl.load(weight_rows + k[None, :], mask=inside, other=0.0)
        x = tl.load(x_rows + k[None, :], mask=inside & (m < M)[:, None], other=0.0)
        if GROUP > 0:
            scale = tl.load(scale_ptr + row * (K // GROUP) + start // GROUP).to(tl.float32)
            total += tl.dot(codes.to(x.dtype), tl.trans(x)) * scale[:, None]
        else:
            total = tl.dot(codes.to(x.dtype), tl.trans(x), total)
    if GROUP == 0:
        total *= tl.load(scale_ptr + row).to(tl.float32)[:, None]
    if HAS_BIAS:
        total += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    where = (part * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_ptr + where, total.to(out_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])
