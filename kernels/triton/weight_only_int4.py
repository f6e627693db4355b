"""int4 codes x 16-bit activations, a scale and perhaps a zero point a group of inputs.

    symmetric            y = sum_g s * sum_k x * (q - 8)
    integer zero point   y = sum_g s * (sum_k x * q  -  z * sum_k x)
    floating zero point  y = sum_g s * sum_k x * (q - 8)  +  z * sum_k x

`weight_only` says how products are cut. At 4.3 TB/s 8.6 10^12 codes arrive in a second, and an H200 issues 29.7 10^12
instructions (132 multiprocessors x 128 lanes x 1.76 GHz), 3.4 a code: instructions are a wall as near as memory. Conversions from
integers are worse, 16 a clock and multiprocessor. So there are none: a code becomes a number by lying in the mantissa of one.

The layout, in which a shift serves many codes and nothing has to be packed again:

* a row is cut into periods of P inputs: 128, or 64 or 32 where the groups ask for it; a period is L = P/8 words of 32 bits;
* nibble q of the low half of word j (q = 0 ... 3) is input 2 L q + 2 j of its period, and nibble q of the high half the next;
* nibbles hold q - 8 in two's complement, and q itself where there is an integer zero point.

**One row.** With the bits of 2^(23-s) around it, a nibble at bit s of a word is the fp32 number 2^(23-s) + q, and a subtraction
makes it q - 8, exactly. A mask, a subtraction and a product, about 4 instructions a code with everything else: the mask comes as
an argument, because an instruction has room for one constant, and with two it would take two.

**Rows.** `(w >> 4 q) & 000F000F ^ 43084308` is two codes at once as bfloat16, 128 + q, and a packed subtraction makes them exact;
with float16 it is 64086408 and 1024. The two are neighbours along K, as tensor cores want them in a register: 2 instructions a
code, and as many again for everything else, whatever the number of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .split import add_parts
from .weight_only import Gpu, Launch, one_row, rows_by_tiles

PERIODS = (128, 64, 32)
_STEP = 128


def period_of(group: int) -> int:
    """Return the inputs of a period of the layout for groups of `group` inputs, a multiple of 32."""
    return next(period for period in PERIODS if group % period == 0)


def pack(codes: torch.Tensor, period: int) -> torch.Tensor:
    """Lay nibbles, uint8 [N, K] in [0, 15], out in words: int32 [N, K/8]."""
    n, k = codes.shape
    # [period, q, word, half] -> [period, word, half, q]
    nibbles = codes.reshape(n, k // period, 4, period // 8, 2).permute(0, 1, 3, 4, 2).reshape(n, k // 8, 4, 2)
    pairs = nibbles[..., 0] | nibbles[..., 1] << 4
    return pairs.contiguous().view(torch.int32).reshape(n, k // 8)


def unpack(words: torch.Tensor, period: int) -> torch.Tensor:
    """Inverse of `pack`."""
    n, k = words.shape[0], words.shape[1] * 8
    pairs = words.view(torch.uint8)
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1).reshape(n, k // period, period // 8, 2, 4)
    return nibbles.permute(0, 1, 4, 2, 3).reshape(n, k).contiguous()


def launch(rows: int, n: int, k: int, gpu: Gpu) -> Launch:
    """Return how a product [rows, k] x [n, k] is cut."""
    if rows == 1:
        return one_row(n, k, 4, gpu)
    return rows_by_tiles(rows, n, k, _STEP, 4, gpu)


def linear(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    gpu: Gpu,
) -> torch.Tensor:
    """Return x W^T + bias, [M, N] of x's dtype.

    Args:
        x: bf16 or fp16 [M, K], unit stride in a row.
        words: int32 [N, K/8], what `pack` returned of nibbles as the module has them.
        scale: [N, G] of a floating dtype, contiguous.
        zero: None; uint8 [N, G], contiguous: integer zero points; or of a floating dtype.
        bias: [N] or None.
        gpu: where the tensors are.
    """
    (m, k), n, groups = x.shape, words.shape[0], scale.shape[1]
    y = x.new_empty(m, n)
    if m == 0:
        return y
    period = period_of(k // groups)
    cut = launch(m, n, k, gpu)
    parts = x.new_empty(cut.cuts, m, n, dtype=torch.float32) if cut.cuts > 1 else y
    fused = bias is not None and cut.cuts == 1
    tensors = (x, words, scale, scale if zero is None else zero, bias if fused else scale, parts)
    constants = {
        "GROUP": k // groups,
        "PERIOD": period,
        "ZERO": 0 if zero is None else 1 if zero.dtype == torch.uint8 else 2,
        "HAS_BIAS": fused,
        "BLOCK_N": cut.block_n,
        "num_warps": cut.warps,
    }
    outputs = triton.cdiv(n, cut.block_n)
    if cut.block_m == 1:
        _one_row[outputs, cut.cuts](*tensors, n, k, cut.span, 15, BLOCK_K=cut.block_k, **constants)
    else:
        grid = (outputs, triton.cdiv(m, cut.block_m), cut.cuts)
        _rows[grid](*tensors, m, n, k, x.stride(0), cut.span, BLOCK_M=cut.block_m, STAGES=cut.stages, **constants)
    if cut.cuts > 1:
        add_parts(parts, bias, y)
    return y


@triton.jit
def _scaled(sums, inputs, scale_ptr, zero_ptr, where, inside, ZERO: tl.constexpr):
    """Turn sums of codes times inputs into sums of weights times inputs.

    Args:
        sums: fp32, a tile.
        inputs: fp32, sums of the inputs, which broadcast to the tile; not read without a zero point.
        scale_ptr: of the weight.
        zero_ptr: of the weight.
        where: of scale and zero point, broadcast to the tile.
        inside: mask of `where`.
        ZERO: 0 none, 1 integer, 2 floating.
    """
    scale = tl.load(scale_ptr + where, mask=inside, other=0.0).to(tl.float32)
    if ZERO == 0:
        return sums * scale
    zero = tl.load(zero_ptr + where, mask=inside, other=0).to(tl.float32)
    if ZERO == 1:
        return (sums - zero * inputs) * scale
    return sums * scale + zero * inputs


@triton.jit
def _one_code(words, mask, SHIFT: tl.constexpr, OFFSET: tl.constexpr):
    """Return the nibble of each word that begins at bit SHIFT as a number; the bit 8 of it is turned round where OFFSET is 8."""
    ONE: tl.constexpr = (127 + 23 - SHIFT) << 23
    return ((words & mask) ^ (ONE | OFFSET << SHIFT)).to(tl.float32, bitcast=True) - ((1 << (23 - SHIFT)) + OFFSET)


@triton.jit
def _one_row(
    x_ptr,
    words_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    span,
    fifteen,
    GROUP: tl.constexpr,
    PERIOD: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply one row; a thread's load is 4 words, 32 codes of one group."""
    LOADS: tl.constexpr = BLOCK_K // 32
    A_PERIOD: tl.constexpr = PERIOD // 32
    OFFSET: tl.constexpr = 0 if ZERO == 1 else 8
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    begin = part * span // 32
    end = tl.minimum(begin + span // 32, K // 32)
    total = tl.zeros([BLOCK_N, LOADS], tl.float32)
    for start in range(begin, end, LOADS):
        load = start + tl.arange(0, LOADS)
        inside = load < end
        where = (row.to(tl.int64)[:, None] * (K // 32) + load[None, :]) * 4
        words = tl.load(words_ptr + (where[:, :, None] + tl.arange(0, 4)[None, None, :]), mask=inside[None, :, None], other=0)
        high_halves = words >> 16
        k = (load // A_PERIOD) * PERIOD + (load % A_PERIOD) * 8
        sums = tl.zeros([BLOCK_N, LOADS, 4], tl.float32)
        inputs = tl.zeros([LOADS], tl.float32)
        for q in tl.static_range(4):
            at = k[:, None] + q * (PERIOD // 4) + tl.arange(0, 8)[None, :]
            x = tl.load(x_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
            if ZERO > 0:
                inputs += tl.sum(x, axis=1)
            x_low, x_high = tl.split(tl.reshape(x, [LOADS, 4, 2]))
            mask = fifteen << 4 * q
            sums += _one_code(words, mask, 4 * q, OFFSET) * x_low[None, :, :]
            sums += _one_code(high_halves, mask, 4 * q, OFFSET) * x_high[None, :, :]
        groups = row[:, None] * (K // GROUP) + (load * 32 // GROUP)[None, :]
        total += _scaled(tl.sum(sums, axis=2), inputs[None, :], scale_ptr, zero_ptr, groups, inside[None, :], ZERO)
    y = tl.sum(total, axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(out_ptr + part * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _two_codes(words, q: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """Return nibbles q of both halves of each word as numbers, neighbours: [BLOCK_N, 2 L]; OFFSET as for `_one_code`."""
    IS_BF16: tl.constexpr = DTYPE == tl.bfloat16  # noqa: SIM300
    ONE: tl.constexpr = 0x43004300 if IS_BF16 else 0x64006400
    BASE: tl.constexpr = 128.0 if IS_BF16 else 1024.0
    both = ((words >> 4 * q) & 0x000F000F) ^ (ONE + OFFSET * 0x00010001)
    numbers = tl.interleave(both.to(tl.int16), (both >> 16).to(tl.int16)).to(DTYPE, bitcast=True)
    return (numbers - (BASE + OFFSET)).to(DTYPE)


@triton.jit
def _rows(
    x_ptr,
    words_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    x_stride,
    span,
    GROUP: tl.constexpr,
    PERIOD: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Multiply a tile of rows by a tile of outputs, 128 inputs a step, a period at a time; that lies within a group."""
    WORDS: tl.constexpr = PERIOD // 8
    PERIODS_OF_A_STEP: tl.constexpr = 128 // PERIOD
    # what one product takes; tensor cores want 16 inputs, and with 4 words two pieces of 8 are put side by side
    PIECE: tl.constexpr = 2 * WORDS if WORDS > 4 else 16
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    OFFSET: tl.constexpr = 0 if ZERO == 1 else 8
    part = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(n, N - 1)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_stride + tl.arange(0, PIECE)[None, :]
    begin = part * span // PERIOD
    end = tl.minimum(begin + span // PERIOD, K // PERIOD)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in tl.range(begin, end, PERIODS_OF_A_STEP, num_stages=STAGES):
        for later in tl.static_range(PERIODS_OF_A_STEP):
            period = step + later
            x_mask = (m < M)[:, None]
            scale_mask = (n < N)[:, None]
            if PERIODS_OF_A_STEP > 1:  # the last step may have fewer: inputs and scales beyond the end are 0
                x_mask &= period < end
                scale_mask &= period < end
            where = (row.to(tl.int64) * (K // PERIOD) + tl.minimum(period, K // PERIOD - 1)) * WORDS
            words = tl.load(words_ptr + (where[:, None] + tl.arange(0, WORDS)[None, :]))
            sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            inputs = tl.zeros([BLOCK_M], tl.float32)
            for piece in tl.static_range(PERIOD // PIECE):
                x = tl.load(x_rows + (period * PERIOD + piece * PIECE), mask=x_mask, other=0.0)
                if WORDS > 4:
                    codes = _two_codes(words, piece, OFFSET, DTYPE)
                else:
                    first = _two_codes(words, 2 * piece, OFFSET, DTYPE)
                    second = _two_codes(words, 2 * piece + 1, OFFSET, DTYPE)
                    codes = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), [BLOCK_N, PIECE])
                sums = tl.dot(codes, tl.trans(x), sums)
                if ZERO > 0:
                    inputs += tl.sum(x.to(tl.float32), axis=1)
            groups = row * (K // GROUP) + period * PERIOD // GROUP
            total += _scaled(sums, inputs[None, :], scale_ptr, zero_ptr, groups[:, None], scale_mask, ZERO)
    if HAS_BIAS:
        total += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    out = (part * M + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_ptr + out, total.to(out_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])
