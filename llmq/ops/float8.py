"""Float8 kernels for NVIDIA GPUs: torch's scaled product for float8 activations, and Triton's product of float8 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.numerics.grid import Float8Activation, Float8Grid
from llmq.numerics.weight import QuantizedWeight
from llmq.ops import triton_support
from llmq.ops.aten import float8_product
from llmq.ops.cuda import cuda_gpu
from llmq.ops.reference import computable, float8_codes, quantize_activation
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
    triton_support.check_device(x)
    kernels, cuts = triton_support.load("weight_only_float8"), triton_support.load("weight_only")
    gpu = cuts.Gpu(triton_support.multiprocessors(x.device), triton_support.shared_memory(x.device))
    y: Tensor = kernels.linear(x if x.stride(1) == 1 else x.contiguous(), weight, scale, bias, gpu)
    return y


def _float8_linear_fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], weight.shape[0])


_LIBRARY.impl("float8_linear", _float8_linear, "CUDA")  # type: ignore[no-untyped-call]
_LIBRARY.impl("float8_linear", _float8_linear, "CPU")  # type: ignore[no-untyped-call]  # Triton's interpreter, or a sentence
torch.library.register_fake("llmq::float8_linear", _float8_linear_fake, lib=_LIBRARY)


class ScaledMm(CanonicalLayout):
    """`torch._scaled_mm` on float8 tensor cores, one scale a row of x and a row of the weight."""

    name = "scaled-mm"
    formats = "float8 weights; float8 activations by token or tensor; bf16"
    min_rows = 1
    max_rows: int | None = None

    def available(self) -> Support:
        """See `Kernel.available`."""
        return cuda_gpu(ADA)

    def supports(self, case: Case) -> Support:
        """See `Kernel.supports`."""
        answer = self.fits(case)
        return self.available() if answer.ok else answer

    def fits(self, case: Case) -> Support:
        """Whether the case is within the kernel's limits, on a machine that has the GPU."""
        answer = _on_gpu(case)
        if not answer.ok:
            return answer
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


class TritonFloat8(CanonicalLayout):
    """Float8 weights read as they are, turned to the activations' dtype in registers, which is exact; fp32 sums, then the scale.

    See `kernels/triton/weight_only_float8.py`.
    """

    name = "triton-float8"
    formats = "float8 weights; bf16 and fp16"
    min_rows = 1
    max_rows: int | None = None

    def available(self) -> Support:
        """See `Kernel.available`."""
        return triton_support.triton_gpu(ADA)

    def supports(self, case: Case) -> Support:
        """See `Kernel.supports`."""
        answer = self.fits(case)
        return self.available() if answer.ok else answer

    def fits(self, case: Case) -> Support:
        """Whether the case is within the kernel's limits, on a machine that has the GPU."""
        answer = _on_gpu(case)
        if not answer.ok:
            return answer
        if case.format.activation is not None:
            return unsupported("it does not quantize activations")
        if case.dtype not in (torch.bfloat16, torch.float16):
            return unsupported(f"it takes bfloat16 and float16 activations, and these are {case.dtype}")
        if case.k % _STEP:
            return unsupported(f"it takes multiples of {_STEP} inputs, and K is {case.k}")
        return SUPPORTED

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:  # noqa: ARG002
        """See `Kernel.linear`."""
        y: Tensor = torch.ops.llmq.float8_linear(x, *tensors, bias)
        return y


def _on_gpu(case: Case) -> Support:
    if case.device != "cuda":
        return unsupported(f"it is for CUDA GPUs, and the weight is on {case.device}")
    if not isinstance(case.format.weight, Float8Grid):
        return unsupported("it takes float8 weights")
    return computable(case)
