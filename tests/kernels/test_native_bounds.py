"""No kernel reads or writes beyond its buffers: each ends where a page begins, or begins where one ends, that nobody may touch.

The sanitized builds see this too, but compilers vectorize those otherwise: GCC 12 once loaded rows that did not exist, in the
optimised library only.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from native_cases import (
    EPS,
    INPUT_SCALE,
    KINDS,
    SCALE_BF16,
    SCALE_F32,
    Linear,
    instruction_sets,
    make_float_linear,
    make_linear,
    make_x,
)
from torch import Tensor

from llmq.ops import native
from llmq.ops.native_abi import DTYPE_BF16, DTYPE_F32, LlmqLinear

LIBC = ctypes.CDLL(None)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE = mmap.PAGESIZE
SHAPES = ((1, 8, 8), (17, 100, 100), (5, 1032, 8), (40, 512, 32), (17, 1024, 128), (33, 1032, 1032))
ROWS = (1, 2, 3, 5, 6, 7, 49)


@contextmanager
def guarded(size: int, *, at_end: bool) -> Iterator[int]:
    """Yield the address of `size` bytes between two pages that may not be touched, next to the one or the other."""
    pages = -(-max(size, 1) // PAGE) + 2
    base = LIBC.mmap(None, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert base != ctypes.c_void_p(-1).value
    last = base + (pages - 1) * PAGE
    for page in (base, last):
        assert LIBC.mprotect(page, PAGE, 0) == 0
    try:
        yield last - size if at_end else base + PAGE
    finally:
        LIBC.munmap(base, pages * PAGE)


def multiply(kernels: native.Kernels, linear: Linear, x: Tensor, *, at_end: bool) -> None:
    """Multiply with every buffer guarded."""
    with ExitStack() as stack:

        def place(tensor: Tensor) -> int:
            address = stack.enter_context(guarded(tensor.nbytes, at_end=at_end))
            ctypes.memmove(address, tensor.contiguous().data_ptr(), tensor.nbytes)
            return address

        packed, bias = place(linear.pack(kernels)), place(linear.bias.float())
        struct = LlmqLinear(*linear.numbers, EPS, INPUT_SCALE, packed, bias)
        size = ctypes.c_int64()
        assert kernels.library.llmq_linear_workspace_bytes(kernels.isa, ctypes.byref(struct), len(x), ctypes.byref(size)) == 0
        kernels.call(
            "llmq_linear",
            ctypes.byref(struct),
            place(x),
            place(torch.empty(len(x), linear.numbers[0], dtype=x.dtype)),
            stack.enter_context(guarded(size.value, at_end=at_end)),
            len(x),
            x.shape[1],
            DTYPE_BF16 if x.dtype is torch.bfloat16 else DTYPE_F32,
            1,
        )


def run_all(isa: str, kind: str) -> None:
    """All shapes and numbers of rows."""
    torch.set_num_threads(1)
    kernels = native.kernels(isa)
    for turn, (n, k, group) in enumerate(SHAPES):
        dtype = torch.float32 if turn % 2 else torch.bfloat16
        if kind == "float":
            linear = make_float_linear(dtype, n, k)
        else:
            linear = make_linear(kind, n, k, group, SCALE_F32 if turn % 3 else SCALE_BF16)
        for m in ROWS:
            for at_end in (True, False):
                multiply(kernels, linear, make_x(m, k, dtype), at_end=at_end)


@pytest.mark.parametrize("kind", [*KINDS, "float"])
@pytest.mark.parametrize("isa", instruction_sets())
def test_nothing_beyond_the_buffers_is_touched(isa: str, kind: str) -> None:
    if isa == "none":
        pytest.skip("the native library cannot run here")
    process = multiprocessing.get_context("fork").Process(target=run_all, args=(isa, kind))  # a fault ends only this
    process.start()
    process.join()
    assert process.exitcode == 0
