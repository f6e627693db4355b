"""Kernels that end in a dense matrix product: unquantized weights, and quantized weights dequantized block by block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from llmq.numerics.grid import Float8Activation, FloatGrid, IntGrid
from llmq.numerics.weight import torch_dtype
from llmq.ops.features import has_native_gemm
from llmq.ops.reference import computable, exact_product, finish, float8_product, largest_product, quantize_activation
from llmq.ops.schema import SUPPORTED, CanonicalLayout, Case, Support, unsupported

BLOCK_ELEMENTS = 1 << 20
"""Weight elements turned to fp32 at a time: 4 MiB, which stays in the cache and below the allocator's mmap threshold."""


class TorchDense(CanonicalLayout):
    """`F.linear` on an unquantized weight of the activations' dtype."""

    name = "torch-dense"
    formats = "unquantized weights of the activations' dtype"
    min_rows = 1
    max_rows: int | None = None

    def available(self) -> Support:
        """See `Kernel.available`."""
        return SUPPORTED

    def supports(self, case: Case) -> Support:
        """See `Kernel.supports`."""
        return _unquantized(case)

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:  # noqa: ARG002
        """See `Kernel.linear`."""
        return F.linear(x, tensors[0], bias)


class DenseUpcast(CanonicalLayout):
    """An unquantized 16-bit weight turned to fp32 block by block, for CPUs whose 16-bit products are slower than that."""

    name = "dense-upcast"
    formats = "unquantized bf16 and fp16 weights, on CPUs without native products of that dtype"
    min_rows = 8
    max_rows: int | None = None

    def available(self) -> Support:
        """See `Kernel.available`."""
        if has_native_gemm(torch.bfloat16) and has_native_gemm(torch.float16):
            return unsupported("this CPU multiplies bf16 and fp16 natively")
        return SUPPORTED

    def supports(self, case: Case) -> Support:
        """See `Kernel.supports`."""
        answer = _unquantized(case)
        if not answer.ok:
            return answer
        if case.device != "cpu":
            return unsupported(f"it is for CPUs, and the weight is on {case.device}")
        if case.dtype == torch.float32:
            return unsupported("the weight is float32 already")
        if has_native_gemm(case.dtype):
            return unsupported(f"this CPU multiplies {case.dtype} natively")
        return SUPPORTED

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        """See `Kernel.linear`."""
        x32 = x.float()
        return by_blocks(case, bias, lambda start, stop: x32 @ tensors[0][start:stop].float().T)


class DequantGemm(CanonicalLayout):
    """Quantized weights turned to fp32 block by block: a few operations a weight, so it is for many rows of x.

    With int8 activations, the products of codes are still summed exactly where the weight has one group a row, which is the
    reference's result bit for bit; with several groups the weight's scales go into the fp32 sum. Float8 codes are multiplied as
    the reference does.
    """

    name = "dequant-gemm"
    formats = "integer and float8 weights, with or without quantized activations"
    min_rows = 1
    max_rows: int | None = None

    def available(self) -> Support:
        """See `Kernel.available`."""
        return SUPPORTED

    def supports(self, case: Case) -> Support:
        """See `Kernel.supports`."""
        if isinstance(case.format.weight, FloatGrid):
            return unsupported("the weight is not quantized")
        return computable(case)

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        """See `Kernel.linear`."""
        weight = self.unpack(tensors, case)
        if case.format.activation is None:
            x32 = x.float()
            return by_blocks(case, bias, lambda start, stop: x32 @ weight.rows(start, stop).dequantize().T)
        codes, scale = quantize_activation(x, case.format.activation, weight.input_scale)
        if isinstance(case.format.activation, Float8Activation):
            return by_blocks(case, bias, lambda start, stop: float8_product(codes, weight.rows(start, stop)) * scale)
        grid = weight.grid
        assert isinstance(grid, IntGrid)
        if grid.groups(case.k) > 1:
            return by_blocks(case, bias, lambda start, stop: (codes @ weight.rows(start, stop).dequantize().T) * scale)
        largest = largest_product(case)

        def exact(start: int, stop: int) -> Tensor:
            block = weight.rows(start, stop)
            assert block.scale is not None
            wq = block.codes().float()
            if block.zero_point is not None:
                wq = wq - block.zero_point.float()
            return exact_product(codes, wq, largest) * scale * block.scale.float().T

        return by_blocks(case, bias, exact)


def by_blocks(case: Case, bias: Tensor | None, product: Callable[[int, int], Tensor]) -> Tensor:
    """Compute the output in blocks of columns, so that only a block of the weight is fp32 at a time.

    Args:
        case: its n and k give the blocks.
        bias: [N] or None.
        product: (start, stop) -> fp32 [M, stop - start].

    Returns:
        [M, N] of `case.dtype`.
    """
    rows = max(1, BLOCK_ELEMENTS // case.k)
    if rows >= case.n:
        return finish(product(0, case.n), bias, case.dtype)
    blocks = []
    for start in range(0, case.n, rows):
        stop = min(start + rows, case.n)
        blocks.append(finish(product(start, stop), None if bias is None else bias[start:stop], case.dtype))
    return torch.cat(blocks, dim=1)


def _unquantized(case: Case) -> Support:
    if not isinstance(case.format.weight, FloatGrid):
        return unsupported("the weight is quantized")
    if case.format.activation is not None:
        return unsupported("the activations are quantized")
    if torch_dtype(case.format.weight.dtype) != case.dtype:
        return unsupported(f"the weight is {case.format.weight.dtype} and the activations are {case.dtype}")
    return computable(case)
