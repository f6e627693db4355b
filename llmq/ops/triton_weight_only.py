"""Weight-only kernels for NVIDIA GPUs, written in Triton: int8 weights, and weights of 2 to 4 bits in groups.

What they compute and how they are cut is in `kernels/triton/weight_only*.py`; here are the operators, which also serve in
compiled graphs and CUDA graphs (nothing waits for the device), the packing, and the limits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.numerics.grid import IntGrid
from llmq.numerics.weight import QuantizedWeight
from llmq.ops import triton_support
from llmq.ops.nibbles import MIDDLE, from_nibbles, is_nibble, nibble_codes
from llmq.ops.schema import SUPPORTED, CanonicalLayout, Case, Support, unsupported

GROUP_MULTIPLE_INT8 = 16
"""Inputs that a thread loads at once: the codes of a load have one scale."""
GROUP_MULTIPLE_INT4 = 32

_LIBRARY = torch.library.Library("llmq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "triton_int8_weight_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor"
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "triton_int4_weight_linear(Tensor x, Tensor words, Tensor scale, Tensor? zero, Tensor? bias) -> Tensor"
)


def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x [M, K] by int8 [N, K] with scales [N, G] -> [M, N] of x's dtype."""
    gpu = triton_support.gpu_of(x)
    y: Tensor = triton_support.load("weight_only_int8").linear(triton_support.readable(x), weight, scale, bias, gpu)
    return y


def _int8_linear_fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], weight.shape[0])


def _int4_linear(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """Multiply x [M, K] by words int32 [N, K/8] with scales and perhaps zero points [N, G] -> [M, N] of x's dtype."""
    gpu = triton_support.gpu_of(x)
    y: Tensor = triton_support.load("weight_only_int4").linear(triton_support.readable(x), words, scale, zero, bias, gpu)
    return y


def _int4_linear_fake(
    x: Tensor,
    words: Tensor,
    scale: Tensor,  # noqa: ARG001
    zero: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape[0], words.shape[0])


for _name, _real, _fake in (
    ("triton_int8_weight_linear", _int8_linear, _int8_linear_fake),
    ("triton_int4_weight_linear", _int4_linear, _int4_linear_fake),
):
    triton_support.register(_LIBRARY, _name, _real, _fake)


class TritonInt8(triton_support.TritonKernel, CanonicalLayout):
    """int8 weights x 16-bit activations: one row in fp32, more of them on tensor cores; codes exact, scales on their sums."""

    name = "triton-int8"
    formats = "int8 weights, symmetric, one scale a row or groups of a multiple of 16; bf16, fp16"

    def fits(self, case: Case) -> Support:
        """See `GpuKernel.fits`."""
        answer = triton_support.weight_only(case)
        if not answer.ok:
            return answer
        grid = case.format.weight
        if not isinstance(grid, IntGrid) or grid.bits != 8 or not grid.symmetric:
            return unsupported("it takes symmetric 8-bit weights")
        if grid.groups(case.k) > 1 and grid.group_size is not None and grid.group_size % GROUP_MULTIPLE_INT8:
            return unsupported(
                f"it takes groups of a multiple of {GROUP_MULTIPLE_INT8} inputs, or one a row, and these are of {grid.group_size}"
            )
        return SUPPORTED

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:  # noqa: ARG002
        """See `Kernel.linear`."""
        y: Tensor = torch.ops.llmq.triton_int8_weight_linear(x, *tensors, bias)
        return y


class TritonInt4(triton_support.TritonKernel):
    """int4 weights x 16-bit activations: one row in fp32, more on tensor cores; scales and zero points on sums of groups."""

    name = "triton-int4"
    layout = "triton-int4-words"
    formats = "int4, int3 and int2 weights (all read as 4 bits), groups of a multiple of 32, all kinds of zero points; bf16, fp16"

    def fits(self, case: Case) -> Support:
        """See `GpuKernel.fits`."""
        answer = triton_support.weight_only(case)
        if not answer.ok:
            return answer
        grid = case.format.weight
        if not isinstance(grid, IntGrid) or not is_nibble(grid):
            return unsupported("it takes weights of 2 to 4 bits")
        if grid.group_size is None and case.k % GROUP_MULTIPLE_INT4:
            return unsupported(f"it takes multiples of {GROUP_MULTIPLE_INT4} inputs, and K is {case.k}")
        if grid.group_size is not None and grid.group_size % GROUP_MULTIPLE_INT4:
            return unsupported(
                f"it takes groups of a multiple of {GROUP_MULTIPLE_INT4} inputs, and these are of {grid.group_size}"
            )
        return SUPPORTED

    def prepack(self, weight: QuantizedWeight) -> tuple[Tensor, ...]:
        """See `Kernel.prepack`: words, scale and, where there is one, zero point."""
        grid = _int_grid(weight.grid)
        kernels = triton_support.load("weight_only_int4")
        codes = nibble_codes(weight) ^ _sign(grid)
        words = kernels.pack(codes, kernels.period_of(grid.group_size or weight.shape[1]))
        return words, *weight.tensors[1:]

    def unpack(self, tensors: tuple[Tensor, ...], case: Case) -> QuantizedWeight:
        """See `Kernel.unpack`."""
        grid = _int_grid(case.format.weight)
        kernels = triton_support.load("weight_only_int4")
        words, scale, *zero = tensors
        codes = kernels.unpack(words, kernels.period_of(grid.group_size or case.k)) ^ _sign(grid)
        return from_nibbles(grid, codes, scale, zero[0] if zero else None)

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:  # noqa: ARG002
        """See `Kernel.linear`."""
        words, scale, *zero = tensors
        y: Tensor = torch.ops.llmq.triton_int4_weight_linear(x, words, scale, zero[0] if zero else None, bias)
        return y


def _int_grid(grid: object) -> IntGrid:
    assert isinstance(grid, IntGrid)  # supports() said so
    return grid


def _sign(grid: IntGrid) -> int:
    """What turns a 4-bit code q into q - 8 in two's complement; nothing for integer zero points, whose codes stay unsigned."""
    return 0 if grid.zero_point == "int" else MIDDLE
