"""Float8 kernels for NVIDIA GPUs: torch's scaled product for float8 activations, and Triton's product of float8 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.numerics.grid import Float8Activation, Float8Grid
from llmq.numerics.weight import QuantizedWeight
from llmq.ops import triton_support
from llmq.ops.aten import float8_product
from llmq.ops.cuda import GpuKernel, on_gpu
from llmq.ops.reference import float8_codes, quantize_activation
from llmq.ops.schema import SUPPORTED, CanonicalLayout, Case, Support, unsupported

ADA = (8, 9)
"""Compute capability of the first GPUs that know float8."""

_STEP = 16
"""N and K of a float8 product are multiples of it: rows of operands start on 16 bytes."""

_LOST = 140 * 2.0**-13
"""See `ScaledMm.slack`."""

_LIBRARY = torch.library.Library("llmq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("float8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]


def _float8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x bf16 or fp16 [M, K] by float8 [N, K] with scales [N, 1], in Triton -> [M, N]."""
    gpu = triton_support.gpu_of(x)
    y: Tensor = triton_support.load("weight_only_float8").linear(triton_support.readable(x), weight, scale, bias, gpu)
    return y


def _float8_linear_fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], weight.shape[0])


triton_support.register(_LIBRARY, "float8_linear", _float8_linear, _float8_linear_fake)


class ScaledMm(GpuKernel, CanonicalLayout):
    """`torch._scaled_mm` on float8 tensor cores, one scale a row of x and a row of the weight."""

    name = "scaled-mm"
    formats = "float8 weights; float8 activations by token or tensor; bf16"
    least = ADA

    def fits(self, case: Case) -> Support:
        """See `GpuKernel.fits`."""
        answer = on_gpu(case)
        if not answer.ok:
            return answer
        if not isinstance(case.format.weight, Float8Grid):
            return unsupported("it takes float8 weights")
        if case.format.activation is None:
            return unsupported("it takes float8 activations")
        if case.dtype != torch.bfloat16:
            return unsupported(f"with a scale a row it gives bfloat16 only, and the activations are {case.dtype}")
        if case.n % _STEP or case.k % _STEP:
            return unsupported(f"it takes multiples of {_STEP} inputs and outputs, and N is {case.n}, K is {case.k}")
        return SUPPORTED

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        """See `Kernel.linear`."""
        assert isinstance(case.format.activation, Float8Activation)
        weight, weight_scale = tensors
        if x.shape[0] == 0:
            return x.new_empty(0, case.n)
        codes, scale = float8_codes(x, case.format.activation)
        y = float8_product(codes.contiguous(), scale.contiguous(), weight, weight_scale.float())
        return y if bias is None else y + bias

    def slack(self, x: Tensor, weight: QuantizedWeight, case: Case) -> Tensor:
        """Return what float8 tensor cores may lose beyond fp32's rounding, fp64 [M, N]; see `check.Coarse`.

        Ada and Hopper align 32 products and the sum so far to the largest of them, keep 14 bits and cut off the rest
        (DeepSeek-V3, arXiv:2412.19437, 3.5.2; SageAttention2, arXiv:2411.10958, finds 13 bits of mantissa in the sum). So an
        addend loses less than 2**-13 of the largest, which is at most S, the sum of magnitudes of what is added up. Without
        fast accumulation a sum goes on in fp32 after 128 products: after 4 times 33 addends and 4 sums, each of which loses
        2**-13 S at most. 140 instead of 136 leaves room for these errors in the sums themselves and in rounding the result.

        That is 1.7 % of sum |x| |w|, where ordinary sums come far closer: the addends are seldom near the largest, and the cuts
        add up like chance. That sums go on after 128 products is the documented way of CUTLASS; where a library does otherwise,
        the start-up test and `llmq bench kernels` say that the kernel is wrong.
        """
        assert case.format.activation is not None  # supports()
        codes, scale = quantize_activation(x, case.format.activation)
        return _LOST * ((codes.double() * scale).abs() @ weight.dequantize(torch.float64).abs().T)


class TritonFloat8(triton_support.TritonKernel, CanonicalLayout):
    """Float8 weights read as they are, turned to the activations' dtype in registers, which is exact; fp32 sums, then the scale.

    See `kernels/triton/weight_only_float8.py`.
    """

    name = "triton-float8"
    formats = "float8 weights; bf16 and fp16"
    least = ADA

    def fits(self, case: Case) -> Support:
        """See `GpuKernel.fits`."""
        answer = triton_support.weight_only(case)
        if not answer.ok:
            return answer
        if not isinstance(case.format.weight, Float8Grid):
            return unsupported("it takes float8 weights")
        if case.k % _STEP:
            return unsupported(f"it takes multiples of {_STEP} inputs, and K is {case.k}")
        return SUPPORTED

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:  # noqa: ARG002
        """See `Kernel.linear`."""
        y: Tensor = torch.ops.llmq.float8_linear(x, *tensors, bias)
        return y
