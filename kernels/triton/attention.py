"""Decode attention: the queries of a few tokens against a KV cache, split over the context.

    y[b, h, t] = sum_j p[j] v[b, g, j] / sum_j p[j]        p[j] = exp(q[b, h, t] . k[b, g, j] / sqrt(D)),  g = h // (H / H_kv)

over the positions j that the query sees: up to its own, and with a window no further back than it reaches. A cache of int8 holds
codes, and a key is its codes times its fp32 scale.

Decoding reads every visible key and value once and does little with it, so its floor is their bytes / bandwidth. One token has
too few heads to fill a GPU; the context is therefore cut into parts, each program takes one part of one key-value head for all
the queries that share it, so that nothing is read twice, and `_combine_parts` joins the parts in their order. Where the parts lie
follows from the position, which is read on the device: the launch is the same for every position, as a CUDA graph needs it.

Scores and softmax are fp32. The second product takes p, where values are of 16 bits, as two summands of their dtype, so that p
keeps 16 or more significant bits; one summand, as usual, would keep 8 in bf16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_PARTS_AT_MOST = 64

_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class Launch:
    """How `decode` cuts the context.

    Attributes:
        parts: of the context, a power of two; each is a program for each key-value head of each sequence.
        block_s: positions at a time.
        warps: of a program.
        stages: blocks of positions in flight at once.
    """

    parts: int
    block_s: int
    warps: int
    stages: int


def launch(heads: int, max_length: int, bytes_a_position: int, multiprocessors: int) -> Launch:
    """Choose how to cut a context.

    Two programs for each multiprocessor or more, as long as a part of a full cache has two blocks. Three blocks of 16 KiB of keys
    or values, and twice that of both, are what a program waits for: 96 KiB.

    Args:
        heads: B H_kv.
        max_length: positions of the cache; how many are visible only the device knows.
        bytes_a_position: of a key, so 2 D for 16 bits.
        multiprocessors: of the GPU.
    """
    block_s = min(128, max(16, triton.next_power_of_2(16384 // bytes_a_position + 1) // 2))
    wanted = triton.next_power_of_2(triton.cdiv(2 * multiprocessors, heads))
    most = triton.next_power_of_2(max(1, max_length // (2 * block_s)))
    return Launch(min(wanted, most, _PARTS_AT_MOST), block_s, 4, 3)


def decode(
    q: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    start: torch.Tensor,
    window: int | None,
    how: Launch,
) -> torch.Tensor:
    """Return the attention of a few tokens to the cache that already holds their own keys and values.

    Args:
        q: [B, H, T, D] of fp32, bf16 or fp16, any strides, rotated.
        cache: keys and values, [B, H_kv, S, D] of q's dtype or both int8; positions of a head D elements apart, heads alike.
        scales: fp32 [B, H_kv, S] each, for int8; heads equally far apart.
        start: integers, one, on the device: the position of the first token.
        window: how many positions a query sees, its own included; None: all up to its own.
        how: what `launch` chose.

    Returns:
        [B, H, T, D] of q's dtype, contiguous.
    """
    (b, h, t, d), (keys, values) = q.shape, cache
    kv_heads, length = keys.shape[1], keys.shape[2]
    heads, rows = b * kv_heads, t * h // kv_heads
    q = q.contiguous()
    y = torch.empty_like(q)
    sums = torch.empty(how.parts, heads, rows, d, dtype=torch.float32, device=q.device)
    largest = torch.empty(how.parts, heads, rows, dtype=torch.float32, device=q.device)
    weight = torch.empty_like(largest)
    key_scales, value_scales = (largest, largest) if scales is None else scales
    block_d = max(16, triton.next_power_of_2(d))
    _attend_part[(heads, how.parts)](
        q, keys, values, key_scales, value_scales, start, sums, largest, weight,
        t, rows, length, d, keys.stride(1), key_scales.stride(1), 1.0 / math.sqrt(d), 0 if window is None else window,
        INT8=scales is not None, WINDOW=window is not None, PARTS=how.parts,
        BLOCK_R=triton.next_power_of_2(rows), BLOCK_S=how.block_s, BLOCK_D=block_d,
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    _combine_parts[(heads * rows,)](
        sums, largest, weight, y, heads * rows, d, PARTS=how.parts, BLOCK_D=block_d, num_warps=4
    )  # fmt: skip
    return y


@triton.jit
def _attend_part(
    q_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    start_ptr,
    sum_ptr,
    largest_ptr,
    weight_ptr,
    T,
    rows,
    length,
    D,
    head_stride,
    scale_stride,
    scale,
    window,
    INT8: tl.constexpr,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend to one part of the context: program (i, part), i = b H_kv + g.

    Args:
        q_ptr: [B H_kv, rows, D]; row r T + t is token t of the r-th head that shares the keys.
        key_ptr: [B H_kv, length, D] of q's dtype; INT8: int8.
        value_ptr: as the keys.
        key_scale_ptr: fp32 [B H_kv, length], where INT8.
        value_scale_ptr: as the keys'.
        start_ptr: integer [1], the position of token 0.
        sum_ptr: fp32 [PARTS, B H_kv, rows, D] out: sum of p v, p relative to the part's largest score.
        largest_ptr: fp32 [PARTS, B H_kv, rows] out: that score times log2 e, -inf where a row sees nothing.
        weight_ptr: fp32, likewise, out: sum of p.
        T: tokens.
        rows: T H / H_kv.
        length: positions of the cache.
        D: size of a head.
        head_stride: elements from one head's keys to the next one's.
        scale_stride: likewise for scales.
        scale: 1 / sqrt(D).
        window: positions that a query sees, its own included, where WINDOW.
        INT8: the cache holds codes.
        WINDOW: whether there is a window.
        PARTS: parts of the context.
        BLOCK_R: power of two from `rows` on.
        BLOCK_S: positions at a time.
        BLOCK_D: power of two from D on, at least 16.
    """
    head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.load(start_ptr).to(tl.int32)
    first = 0
    if WINDOW:
        first = tl.maximum(start - window + 1, 0)
    stop = tl.minimum(start + T, length)
    span = tl.cdiv(tl.cdiv(stop - first, PARTS), BLOCK_S) * BLOCK_S
    begin = first + part * span
    rs, ds = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    q_inside = (rs[:, None] < rows) & (ds[None, :] < D)
    q = tl.load(q_ptr + (head * rows + rs[:, None]) * D + ds[None, :], mask=q_inside, other=0.0)
    position = start + rs % T
    largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_R], tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for block in range(begin, tl.minimum(begin + span, stop), BLOCK_S):
        js = block + tl.arange(0, BLOCK_S)
        inside = js < stop
        where = head * head_stride + js * D
        key = tl.load(key_ptr + where[None, :] + ds[:, None], mask=inside[None, :] & (ds[:, None] < D), other=0)
        value = tl.load(value_ptr + where[:, None] + ds[None, :], mask=inside[:, None] & (ds[None, :] < D), other=0)
        scores = tl.dot(q, key.to(q.dtype), input_precision="ieee") * (scale * _LOG2_E)
        if INT8:
            scores *= tl.load(key_scale_ptr + head * scale_stride + js, mask=inside, other=0.0)[None, :]
        seen = inside[None, :] & (js[None, :] <= position[:, None])
        if WINDOW:
            seen &= js[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        origin = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        p = tl.exp2(scores - origin[:, None])
        shrink = tl.exp2(largest - origin)
        weight = weight * shrink + tl.sum(p, axis=1)
        if INT8:
            p *= tl.load(value_scale_ptr + head * scale_stride + js, mask=inside, other=0.0)[None, :]
        # codes are exact in bf16, whose range a value's scale cannot leave
        factor: tl.constexpr = tl.bfloat16 if INT8 and q.dtype != tl.float32 else q.dtype
        high = p.to(factor)
        total = tl.dot(high, value.to(factor), total * shrink[:, None], input_precision="ieee")
        if factor != tl.float32:
            total = tl.dot((p - high.to(tl.float32)).to(factor), value.to(factor), total)
        largest = higher
    row = (part * tl.num_programs(0) + head) * rows + rs
    tl.store(sum_ptr + row[:, None] * D + ds[None, :], total, mask=q_inside)
    tl.store(largest_ptr + row, largest, mask=rs < rows)
    tl.store(weight_ptr + row, weight, mask=rs < rows)


@triton.jit
def _combine_parts(
    sum_ptr,
    largest_ptr,
    weight_ptr,
    y_ptr,
    rows,
    D,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Join the parts of one row: program i of B H T.

    Args:
        sum_ptr: fp32 [PARTS, rows, D]; see `_attend_part`.
        largest_ptr: fp32 [PARTS, rows].
        weight_ptr: fp32 [PARTS, rows].
        y_ptr: [rows, D] out.
        rows: B H T.
        D: size of a head.
        PARTS: a power of two.
        BLOCK_D: power of two from D on.
    """
    row = tl.program_id(0).to(tl.int64)
    parts, ds = tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    where = parts * rows + row
    largest = tl.load(largest_ptr + where)
    share = tl.exp2(largest - tl.max(largest, axis=0))  # every query sees itself, so one of them is finite
    weight = tl.sum(tl.load(weight_ptr + where) * share, axis=0)
    sums = tl.load(sum_ptr + where[:, None] * D + ds[None, :], mask=ds[None, :] < D, other=0.0)
    y = tl.sum(sums * share[:, None], axis=0) / weight
    tl.store(y_ptr + row * D + ds, y.to(y_ptr.dtype.element_ty), mask=ds < D)
