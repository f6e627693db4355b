"""The kernel made of the native library: int8 weights, int8 activations, exact integer sums, one call a linear."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.numerics.grid import IntGrid
from llmq.numerics.weight import QuantizedWeight, torch_dtype
from llmq.ops import native
from llmq.ops.reference import computable
from llmq.ops.schema import SUPPORTED, Case, Support, unsupported

_LARGEST_K = 131072
"""LLMQ_MAX_K of llmq_cpu.h."""

_LINEAR = torch.ops.llmq.int8_dynamic_linear.default  # resolving the overload at each call would take longer than the call


class NativeInt8Dynamic:
    """`llmq::int8_dynamic_linear`: quantizes the rows of x, multiplies, scales and adds the bias; see `ops.native`.

    Bit for bit the same for every instruction set, number of threads and number of rows beside a row.
    """

    name = "native-int8-dynamic"
    formats = "int8 weights, one scale a row; symmetric int8 activations"
    min_rows = 1
    max_rows: int | None = None

    @property
    def layout(self) -> str:
        """See `Kernel.layout`. The name of the packing, which differs between instruction sets."""
        status = native.status()
        return f"native-{native.int8_kernels().layout}" if isinstance(status, native.Available) else "native-int8"

    def available(self) -> Support:
        """See `Kernel.available`."""
        status = native.status()
        if isinstance(status, native.Unavailable):
            return unsupported(status.reason.removesuffix("."))
        if status.isa == "generic":
            return unsupported("the native library has only portable code for this CPU, slower than torch's fp32 products")
        return SUPPORTED

    def supports(self, case: Case) -> Support:
        """See `Kernel.supports`."""
        answer = self.available()
        if not answer.ok:
            return answer
        if case.device != "cpu":
            return unsupported(f"it is for CPUs, and the weight is on {case.device}")
        grid, activation = case.format.weight, case.format.activation
        if activation is None or not activation.symmetric:
            return unsupported("it takes symmetric int8 activations")
        if not isinstance(grid, IntGrid) or grid.bits != 8 or not grid.symmetric or grid.groups(case.k) != 1:
            return unsupported("it takes symmetric 8-bit weights with one scale a row")
        if not torch.finfo(torch.float32).smallest_normal <= activation.eps < float("inf"):
            return unsupported(f"it takes an eps that is a normal positive fp32 number, and this is {activation.eps}")
        if case.k > _LARGEST_K:
            return unsupported(f"it takes up to {_LARGEST_K} inputs, and K is {case.k}")
        return computable(case)

    def prepack(self, weight: QuantizedWeight) -> tuple[Tensor, ...]:
        """See `Kernel.prepack`: packed codes, and the scale in fp32 (exact: it is at most that wide)."""
        assert weight.scale is not None
        return native.int8_kernels().pack(weight.codes()), weight.scale.reshape(-1).float()

    def unpack(self, tensors: tuple[Tensor, ...], case: Case) -> QuantizedWeight:
        """See `Kernel.unpack`."""
        grid = case.format.weight
        assert isinstance(grid, IntGrid)
        packed, scale = tensors
        codes = native.int8_kernels().unpack(packed, case.n, case.k)
        return QuantizedWeight.from_codes(grid, codes, scale.reshape(case.n, 1).to(torch_dtype(grid.scale_dtype)))

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        """See `Kernel.linear`."""
        assert case.format.activation is not None
        packed, scale = tensors
        y: Tensor = _LINEAR(x, packed, scale, bias, case.n, case.format.activation.eps)
        return y
