"""The ordered table of kernels, and which of them runs for how many rows."""

from __future__ import annotations

import functools

from llmq.errors import KernelError, suggest
from llmq.ops.aten import AtenInt4PackCpu, AtenInt8Pack, AtenIntMm
from llmq.ops.cpu import NATIVE_KERNELS
from llmq.ops.cuda import CudaIntMm, Tinygemm
from llmq.ops.dense import DenseUpcast, DequantGemm, TorchDense
from llmq.ops.float8 import ScaledMm, TritonFloat8
from llmq.ops.reference import Reference
from llmq.ops.schema import Kernel
from llmq.ops.triton_int8 import TritonInt8Dynamic, TritonInt8DynamicInt4
from llmq.ops.triton_weight_only import TritonInt4, TritonInt8

KERNELS: tuple[Kernel, ...] = (
    *NATIVE_KERNELS,
    AtenIntMm(),
    TritonInt8Dynamic(),
    TritonInt8DynamicInt4(),
    CudaIntMm(),
    TritonInt8(),
    TritonInt4(),
    Tinygemm(),
    ScaledMm(),
    TritonFloat8(),
    AtenInt8Pack(),
    AtenInt4PackCpu(),
    DenseUpcast(),
    TorchDense(),
    DequantGemm(),
    Reference(),
)
"""Fastest first. The first that supports a case decides the layout; the others of that layout serve the rows it leaves."""

REFERENCE = "reference"
"""Name of the kernel that defines the result and always qualifies."""


def kernel_named(name: str) -> Kernel:
    """Return the kernel of that name.

    Raises:
        KernelError: when there is none; suggests one.
    """
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise KernelError(f"unknown kernel {name!r}.{suggest(name, [kernel.name for kernel in KERNELS])}")


@functools.cache
def row_ranges(names: tuple[str, ...], until: tuple[int | None, ...] = ()) -> tuple[tuple[int | None, Kernel], ...]:
    """Split the numbers of rows among kernels, earlier ones first.

    Args:
        names: kernels of one layout, in order; the last takes whatever the others leave.
        until: the last number of rows of each, in ascending order, None for the last; empty: their own limits say.

    Returns:
        (last number of rows or None, kernel) in ascending order; the last entry has None.
    """
    kernels = [kernel_named(name) for name in names]
    if until:
        return tuple(zip(until, kernels, strict=True))
    starts = sorted({1, *(k.min_rows for k in kernels), *(k.max_rows + 1 for k in kernels if k.max_rows is not None)})
    ranges: list[tuple[int | None, Kernel]] = []
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        taking = [k for k in kernels if k.min_rows <= start and (k.max_rows is None or start <= k.max_rows)]
        kernel = taking[0] if taking else kernels[-1]
        if ranges and ranges[-1][1] is kernel:
            ranges.pop()
        ranges.append((None if following is None else following - 1, kernel))
    return tuple(ranges)


def describe_rows(names: tuple[str, ...], until: tuple[int | None, ...] = ()) -> str:
    """Return '1-7 rows: a; 8+ rows: b', or 'a' when one kernel takes all; the arguments are those of `row_ranges`."""
    ranges = row_ranges(names, until)
    if len(ranges) == 1:
        return ranges[0][1].name
    parts, start = [], 1
    for last, kernel in ranges:
        rows = f"{start}+" if last is None else f"{start}-{last}" if last > start else f"{start}"
        parts.append(f"{rows} rows: {kernel.name}")
        start = 0 if last is None else last + 1
    return "; ".join(parts)
