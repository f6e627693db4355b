"""int8 activations x int4 weights in groups: exact integer sums of at most 128 products, each scaled in fp32.

    y[m, n] = round( xs[m] * sum_c ws[n, c] * float(S[m, n, c] - xz[m] * W[n, c]) + bias[n] )
    S[m, n, c] = sum_k xq[m, k] * w[n, k]        W[n, c] = sum_k w[n, k]        w = wq - wz        k over the chunk c

A chunk is a group, or the part of one that a matrix instruction takes at once. xq - xz needs nine bits and would not fit into
the operand of an int8 instruction, so the zero point of a row meets the chunk's sum of weights, which is stored beside them;
S - xz W is an integer far below 2**24, and nothing is rounded before the scale.

How weights lie (`llmq/ops/triton_int8.py` packs them): panels of 16 outputs; in a panel, pairs of chunks; in a pair 16 rows of
`CHUNK` bytes. The low nibble of byte j is input j of the pair's first chunk and the high nibble input j of its second, both in
two's complement. A program therefore reads whole runs of 16 * CHUNK bytes, and both halves of a byte meet adjacent inputs.
Scales, zero points and sums lie transposed, as a program wants them: one row for each group or chunk.

What bounds it. Few rows are bound by memory, N K / 2 bytes and the scales. Many rows are not bound by the matrix instructions:
every CHUNK of their products is followed by three fp32 operations, so with groups of 32 those are what takes the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .int8 import FEW_ROWS
from .quantize import quantize
from .split import add_parts

PANEL = 16
"""Outputs of a panel."""
LONGEST_CHUNK = 128
"""Most inputs of a chunk."""

_PANEL = tl.constexpr(PANEL)


@dataclass(frozen=True, slots=True)
class Launch:
    """How `linear` cuts a product.

    Attributes:
        block_m: rows of a tile.
        block_n: outputs of a tile.
        group_m: tiles of rows that take turns over the outputs.
        spans: parts into which the pairs of chunks are cut; more than one takes a second launch.
        warps: of a program.
        stages: pairs of chunks in flight at once.
    """

    block_m: int
    block_n: int
    group_m: int
    spans: int
    warps: int
    stages: int

    def shared_bytes(self, chunk: int) -> int:
        """Shared memory that a program takes: for each pair in flight bytes and codes; and for a pair unpacked."""
        return (2 * self.block_m + self.block_n) * chunk * self.stages + 2 * self.block_n * chunk

    def span(self, pairs: int) -> int:
        """Pairs of one part."""
        return triton.cdiv(pairs, self.spans)


def launch(rows: int, n: int, shape: tuple[int, int], multiprocessors: int, shared: int) -> Launch:
    """Choose how to cut [rows, K] x [n, K].

    Few rows: tiles of 4 KiB, or 2 KiB where chunks are short, of which 6 to 8 are in flight, and K cut into parts of 4 pairs or
    more until there are four programs for each multiprocessor. Many rows: tiles of 128 x 128, and smaller ones where there is
    less than one of those for every second multiprocessor, or not the shared memory.

    Args:
        rows: of x, at least 1.
        n: outputs.
        shape: pairs of chunks along K, and inputs of a chunk.
        multiprocessors: of the GPU.
        shared: bytes of shared memory that a program may have.
    """
    pairs, chunk = shape
    if rows <= FEW_ROWS:
        block_n = 32 if chunk == LONGEST_CHUNK else 64
        spans = max(1, min(4 * multiprocessors // triton.cdiv(n, block_n), pairs // 4))
        spans = triton.cdiv(pairs, triton.cdiv(pairs, spans))  # none is empty
        return Launch(triton.next_power_of_2(rows), block_n, 1, spans, 4, 6 if chunk == LONGEST_CHUNK else 8)
    large, small = Launch(128, 128, 8, 1, 8, 3), Launch(64 if rows > 32 else 32, 64, 8, 1, 4, 3)
    tiles = triton.cdiv(rows, 128) * triton.cdiv(n, 128)
    return large if rows > 64 and 2 * tiles > multiprocessors and large.shared_bytes(chunk) <= shared else small


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A packed weight; the module says how it lies.

    Attributes:
        packed: uint8 [panels, pairs, 16, chunk].
        scale: fp32, bf16 or fp16 [groups, N], contiguous.
        zero: uint8 [groups, N] in [0, 15], contiguous, or None.
        sums: int16 [chunks, N], contiguous; None where the activations are symmetric.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    sums: torch.Tensor | None


def linear(
    x: torch.Tensor, weight: Weight, input_scale: torch.Tensor | None, bias: torch.Tensor | None, eps: float, how: Launch
) -> torch.Tensor:
    """Return the product of the quantized rows of x and the weight, plus the bias.

    Args:
        x: [M, K] of fp32, bf16 or fp16, any strides; M > 0.
        weight: packed.
        input_scale: fp32 [1], the scale of all rows, or None.
        bias: [N] or None.
        eps: smallest scale that a row finds for itself.
        how: what `launch` chose.

    Returns:
        [M, N] of x's dtype.
    """
    (m, k), n = x.shape, weight.scale.shape[1]
    pairs, chunk = weight.packed.shape[1], weight.packed.shape[3]
    codes, scale, zero = quantize(x, input_scale, eps, symmetric=weight.sums is None)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    split = how.spans > 1
    out = torch.empty(how.spans, m, n, dtype=torch.float32, device=x.device) if split else y
    own = None if split or bias is None else bias.contiguous()
    tiles = triton.cdiv(m, how.block_m) * triton.cdiv(n, how.block_n)
    _int4_product[(tiles, how.spans)](
        codes, scale, _or(zero, codes), weight.packed, weight.scale, _or(weight.zero, codes), _or(weight.sums, codes),
        _or(own, codes), out, m, n, k, pairs, how.span(pairs), k // weight.scale.shape[0] // chunk,
        SYMMETRIC=zero is None, HAS_ZERO=weight.zero is not None, HAS_BIAS=own is not None, SPLIT=split,
        WHOLE=k == 2 * pairs * chunk, BLOCK_M=how.block_m, BLOCK_N=how.block_n, CHUNK=chunk, GROUP_M=how.group_m,
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    if split:
        add_parts(out, bias, y)
    return y


def _or(tensor: torch.Tensor | None, unread: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or one to hold the place of a pointer that is not read."""
    return unread if tensor is None else tensor


@triton.jit
def _unpacked(packed, zero_ptr, group, cols, N, HIGH: tl.constexpr, HAS_ZERO: tl.constexpr):
    """Return a chunk of weights as int8 [CHUNK, outputs]: 16 times them, which takes one operation, or less their zero points."""
    sixteenfold = packed & 0xF0 if HIGH else packed << 4
    weights = sixteenfold.to(tl.int8, bitcast=True)
    if HAS_ZERO:
        zero = tl.load(zero_ptr + group * N + cols, mask=cols < N, other=0).to(tl.int8)
        weights = (weights >> 4) - (zero - 8)[None, :]
    return weights


@triton.jit
def _add_chunk(
    total,
    codes,
    weights,
    zero_point,
    scale_ptr,
    sum_ptr,
    chunk,
    group,
    cols,
    inside,
    N,
    SYMMETRIC: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    """Return total + scale * (sum of products - zero point * sum of weights); `inside` is false where there is no chunk."""
    products = tl.dot(codes, weights, out_dtype=tl.int32)
    if not HAS_ZERO:
        products = products >> 4
    sums = products.to(tl.float32)
    present = (cols < N) & inside
    if not SYMMETRIC:
        weight_sums = tl.load(sum_ptr + chunk * N + cols, mask=present, other=0).to(tl.float32)
        sums -= zero_point[:, None] * weight_sums[None, :]
    scale = tl.load(scale_ptr + group * N + cols, mask=present, other=0.0).to(tl.float32)
    return total + sums * scale[None, :]


@triton.jit
def _int4_product(
    codes_ptr,
    x_scale_ptr,
    x_zero_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    sum_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    pairs,
    span,
    chunks_a_group,
    SYMMETRIC: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Multiply a tile of rows by a tile of int4 weights, over all pairs of chunks or a span of them.

    Args:
        codes_ptr: int8 codes of x [M, K].
        x_scale_ptr: fp32 [M].
        x_zero_ptr: int32 [M], not read where SYMMETRIC.
        weight_ptr: uint8 [panels, pairs, 16, CHUNK]; see the module.
        scale_ptr: fp32, bf16 or fp16 [groups, N].
        zero_ptr: uint8 [groups, N] in [0, 15], where HAS_ZERO.
        sum_ptr: int16 [chunks, N], not read where SYMMETRIC.
        bias_ptr: [N], where HAS_BIAS.
        out_ptr: y [M, N]; SPLIT: fp32 [spans, M, N] for `add_parts`.
        M: rows.
        N: outputs.
        K: inputs, a multiple of CHUNK.
        pairs: pairs of chunks; the second chunk of the last one may be padding.
        span: pairs of a program.
        chunks_a_group: chunks that share a scale.
        SYMMETRIC: the activations have no zero point.
        HAS_ZERO: the weights have one.
        HAS_BIAS: whether there is a bias.
        SPLIT: there are several spans, whose results `add_parts` adds up.
        WHOLE: K is a whole number of pairs.
        BLOCK_M: rows of a tile.
        BLOCK_N: outputs of a tile, a multiple of 16.
        CHUNK: 32, 64 or 128.
        GROUP_M: as in `int8_product`.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    rows = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    js = tl.arange(0, CHUNK)
    x_ptrs = codes_ptr + rows.to(tl.int64)[:, None] * K + js[None, :]
    panel_rows = (cols // _PANEL).to(tl.int64) * pairs * (_PANEL * CHUNK) + cols % _PANEL * CHUNK
    w_ptrs = weight_ptr + panel_rows[None, :] + js[:, None]
    x_inside, w_inside = rows[:, None] < M, cols[None, :] < tl.cdiv(N, _PANEL) * _PANEL
    zero_point = tl.zeros([BLOCK_M], tl.float32)
    if not SYMMETRIC:
        zero_point = tl.load(x_zero_ptr + rows, mask=rows < M, other=0).to(tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin = part * span
    for pair in range(begin, tl.minimum(begin + span, pairs)):
        packed = tl.load(w_ptrs + pair * (_PANEL * CHUNK), mask=w_inside, other=0)
        low_chunk, high_chunk = 2 * pair, 2 * pair + 1
        there = WHOLE or high_chunk * CHUNK < K
        low_codes = tl.load(x_ptrs + low_chunk * CHUNK, mask=x_inside, other=0)
        high_codes = tl.load(x_ptrs + high_chunk * CHUNK, mask=x_inside & there, other=0)
        low_group = low_chunk // chunks_a_group
        high_group = tl.minimum(high_chunk, K // CHUNK - 1) // chunks_a_group
        low = _unpacked(packed, zero_ptr, low_group, cols, N, HIGH=False, HAS_ZERO=HAS_ZERO)
        high = _unpacked(packed, zero_ptr, high_group, cols, N, HIGH=True, HAS_ZERO=HAS_ZERO)
        total = _add_chunk(
            total, low_codes, low, zero_point, scale_ptr, sum_ptr, low_chunk, low_group, cols, pair >= 0, N, SYMMETRIC, HAS_ZERO
        )
        total = _add_chunk(
            total, high_codes, high, zero_point, scale_ptr, sum_ptr, high_chunk, high_group, cols, there, N, SYMMETRIC, HAS_ZERO
        )
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    where = rows.to(tl.int64)[:, None] * N + cols[None, :]
    if SPLIT:
        where += part.to(tl.int64) * M * N
    y = total * tl.load(x_scale_ptr + rows, mask=rows < M, other=0.0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + where, y.to(out_ptr.dtype.element_ty), mask=inside)
