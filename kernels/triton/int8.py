"""int8 x int8: activations quantized per token, and their product with int8 weights that have one scale an output.

    y[m, n] = round( float(sum_k xq[m, k] * wq[n, k]) * ws[n] * xs[m] + bias[n] )        the sum exact, in int32

Codes and scales are those of `quantize`.

What bounds it. 2,048 rows are bound by operations: 2 M N K / peak, where the peak of int8 is twice that of bf16, so the product
alone takes at least half of what bf16 takes; reading x twice and writing its codes comes on top, (2 * 2 + 1) M K bytes at most
from L2, once for all outputs. Up to 16 rows are bound by memory: N K bytes / bandwidth, each weight read once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .quantize import SCAN, encode, quantize, row_grid, scan_rows

FEW_ROWS = 16
"""Rows of the instructions' smallest tile: up to here a product is a stream of weights."""
_FUSED_ROWS = 4
_FINISH_OUTPUTS = 512


@dataclass(frozen=True, slots=True)
class Launch:
    """How `linear` cuts a product, and what each kernel is compiled for.

    Attributes:
        block_m: rows of a tile.
        block_n: outputs of a tile.
        block_k: inputs at a time.
        group_m: tiles of rows that take turns over the outputs.
        spans: parts into which K is cut; more than one takes a second launch.
        fused: whether the product quantizes x itself.
        warps: of a program.
        stages: blocks of inputs in flight at once.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    spans: int
    fused: bool
    warps: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory that the blocks in flight take."""
        return (self.block_m + self.block_n) * self.block_k * self.stages

    def span(self, k: int) -> int:
        """Inputs of one part: whole blocks."""
        return triton.cdiv(triton.cdiv(k, self.spans), self.block_k) * self.block_k


def launch(rows: int, n: int, k: int, multiprocessors: int, shared: int) -> Launch:
    """Choose how to cut [rows, k] x [n, k].

    Few rows: tiles of 32 outputs and blocks of 256 inputs, five of them in flight: a program waits for 40 KiB, where a
    multiprocessor of an H200 needs some 26 KiB under way to have its share of 4.3 TB/s at 0.8 us a read. Where that gives less
    than one tile for every second multiprocessor, K is cut, too. Up to 4 rows a program makes its codes itself: all programs
    together then read x as often as there are tiles, from L2, which is at most a quarter of the weights' bytes, twice.

    Many rows: the largest tile of which there is one for each multiprocessor. What a tile reads for each product falls with its
    size: 128 x 256 takes 384 bytes for 32,768 products, and L2 has to deliver them.

    Args:
        rows: of x, at least 1.
        n: outputs.
        k: inputs.
        multiprocessors: of the GPU.
        shared: bytes of shared memory that a program may have.
    """
    if rows <= FEW_ROWS:
        tiles = triton.cdiv(n, 32)
        spans = 1 if 2 * tiles > multiprocessors else min(multiprocessors // tiles, triton.cdiv(k, 1024))
        spans = triton.cdiv(k, triton.cdiv(triton.cdiv(k, spans), 256) * 256)  # none is empty
        return Launch(triton.next_power_of_2(rows), 32, 256, 1, spans, rows <= _FUSED_ROWS, 4, 5)
    small = Launch(64 if rows > 32 else 32, 64, 128, 8, 1, fused=False, warps=4, stages=4)
    for block_n, block_k, stages in ((256, 128, 4), (256, 64, 4), (128, 128, 4), (128, 128, 3)):
        how = Launch(128, block_n, block_k, 8, 1, fused=False, warps=8, stages=stages)
        tiles = triton.cdiv(rows, 128) * triton.cdiv(n, block_n)
        if rows > 64 and how.shared_bytes <= shared and 2 * tiles > multiprocessors:
            return how
    return small


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    how: Launch,
) -> torch.Tensor:
    """Return the product of the quantized rows of x and the weight, plus the bias.

    Args:
        x: [M, K] of fp32, bf16 or fp16, any strides; M > 0.
        weight: int8 [N, K], contiguous.
        weight_scale: fp32, bf16 or fp16 [N, 1], contiguous.
        input_scale: as in `quantize`.
        bias: [N] or None.
        eps: as in `quantize`.
        how: what `launch` chose.

    Returns:
        [M, N] of x's dtype.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    (m, k), n = x.shape, weight.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    static, split = input_scale is not None, how.spans > 1
    rows, scale = x, input_scale if static else y
    if not how.fused:
        rows, scale, _ = quantize(x, input_scale, eps, symmetric=True)
    elif split:
        scale_out = torch.empty(m, dtype=torch.float32, device=x.device)
    out = torch.empty(how.spans, m, n, dtype=torch.int32, device=x.device) if split else y
    addend = y if bias is None else bias.contiguous()
    tiles = triton.cdiv(m, how.block_m) * triton.cdiv(n, how.block_n)
    _int8_product[(tiles, how.spans)](
        rows, scale, weight, weight_scale, addend, out, scale_out if how.fused and split else out,
        m, n, k, rows.stride(0), how.span(k), eps,
        FUSED=how.fused, STATIC=static, HAS_BIAS=bias is not None, SPLIT=split, WHOLE=k % how.block_k == 0,
        BLOCK_M=how.block_m, BLOCK_N=how.block_n, BLOCK_K=how.block_k, GROUP_M=how.group_m,
        SCAN=min(triton.next_power_of_2(k), SCAN // how.block_m), num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    if split:
        _int8_finish[(m, triton.cdiv(n, _FINISH_OUTPUTS))](
            out, scale_out if how.fused else scale, weight_scale, addend, y, m, n, how.spans,
            HAS_BIAS=bias is not None, BLOCK_M=1, BLOCK_N=_FINISH_OUTPUTS,
        )  # fmt: skip
    return y


@triton.jit
def _finish_tile(total, row_scale, output_scale, bias_ptr, cols, N, HAS_BIAS: tl.constexpr):
    """Scale int32 sums [rows, outputs] and add the bias, in fp32."""
    y = total.to(tl.float32) * output_scale[None, :] * row_scale[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _int8_product(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    x_scale_out_ptr,
    M,
    N,
    K,
    stride,
    span,
    eps,
    FUSED: tl.constexpr,
    STATIC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Multiply a tile of rows by a tile of int8 weights, over all inputs or a span of them.

    Programs of axis 0 are tiles: GROUP_M tiles of rows take turns over the outputs, so that what runs at the same time reads few
    rows and few weights, which then stay in L2. Programs of axis 1 are spans of the inputs.

    Args:
        x_ptr: int8 codes [M, K]; FUSED: x itself, of which every program makes the codes that it needs.
        x_scale_ptr: fp32 [M], the codes' scales; FUSED: fp32 [1], the static scale, where STATIC.
        weight_ptr: int8 [N, K].
        weight_scale_ptr: fp32, bf16 or fp16 [N].
        bias_ptr: [N], where HAS_BIAS.
        out_ptr: y [M, N]; SPLIT: int32 [spans, M, N] for `_int8_finish`.
        x_scale_out_ptr: fp32 [M], where FUSED and SPLIT: the scales for `_int8_finish`.
        M: rows.
        N: outputs.
        K: inputs.
        stride: elements from row to row of x or of its codes.
        span: inputs of a program, a multiple of BLOCK_K.
        eps: as in `quantize`.
        FUSED: see x_ptr. It costs two readings of x by each program, and saves a launch.
        STATIC: as in `quantize`; read only where FUSED.
        HAS_BIAS: whether there is a bias.
        SPLIT: store the sums of the span, and leave the rest to `_int8_finish`.
        WHOLE: every span is whole blocks of inputs, so that none needs a mask.
        BLOCK_M: rows of a tile.
        BLOCK_N: outputs of a tile.
        BLOCK_K: inputs at a time.
        GROUP_M: see above.
        SCAN: inputs at a time when FUSED looks for the largest.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    rows = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    row_offsets = rows.to(tl.int64)[:, None] * stride
    col_offsets = cols.to(tl.int64)[None, :] * K
    if FUSED:
        lowest, highest, bits = scan_rows(x_ptr, rows, M, K, stride, BLOCK_M, SCAN)
        row_scale, inverse, _ = row_grid(lowest, highest, bits, x_scale_ptr, eps, SYMMETRIC=True, STATIC=STATIC)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    begin = part * span
    for start in range(begin, tl.minimum(begin + span, K), BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x_inside, w_inside = rows[:, None] < M, cols[None, :] < N
        if not WHOLE:
            x_inside, w_inside = x_inside & (ks[None, :] < K), w_inside & (ks[:, None] < K)
        weight = tl.load(weight_ptr + col_offsets + ks[:, None], mask=w_inside, other=0)
        codes = tl.load(x_ptr + row_offsets + ks[None, :], mask=x_inside, other=0)
        if FUSED:
            codes = encode(codes.to(tl.float32), inverse[:, None], 0.0, SYMMETRIC=True)
        total = tl.dot(codes, weight, total, out_dtype=tl.int32)
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    where = rows.to(tl.int64)[:, None] * N + cols[None, :]
    if SPLIT:
        tl.store(out_ptr + part.to(tl.int64) * M * N + where, total, mask=inside)
        if FUSED:
            tl.store(x_scale_out_ptr + rows, row_scale, mask=(rows < M) & (within // height == 0) & (part == 0))
    else:
        if not FUSED:
            row_scale = tl.load(x_scale_ptr + rows, mask=rows < M, other=0.0)
        output_scale = tl.load(weight_scale_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        y = _finish_tile(total, row_scale, output_scale, bias_ptr, cols, N, HAS_BIAS)
        tl.store(out_ptr + where, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _int8_finish(
    parts_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    parts,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add up the sums of the spans, int32 [parts, M, N], which are exact in any order, and scale them.

    Args:
        parts_ptr: what `_int8_product` stored.
        x_scale_ptr: fp32 [M].
        weight_scale_ptr: fp32, bf16 or fp16 [N].
        bias_ptr: [N], where HAS_BIAS.
        y_ptr: [M, N].
        M: rows.
        N: outputs.
        parts: number of spans.
        HAS_BIAS: whether there is a bias.
        BLOCK_M: rows of a program.
        BLOCK_N: outputs of a program.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    where = rows.to(tl.int64)[:, None] * N + cols[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for _ in range(parts):
        total += tl.load(parts_ptr + where, mask=inside, other=0)
        parts_ptr += M * N
    row_scale = tl.load(x_scale_ptr + rows, mask=rows < M, other=0.0)
    output_scale = tl.load(weight_scale_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    y = _finish_tile(total, row_scale, output_scale, bias_ptr, cols, N, HAS_BIAS)
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=inside)
