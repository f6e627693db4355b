"""Kernels for NVIDIA GPUs: torch's tinygemm int4 product, and its int8 product."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from llmq.numerics.grid import IntGrid
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.aten import (
    from_tinygemm,
    int4_product_cuda,
    int8_dynamic,
    int8_linear,
    pack_int4_cuda,
    scale_and_zero,
    tinygemm_grid,
)
from llmq.ops.nibbles import nibble_codes
from llmq.ops.reference import computable
from llmq.ops.schema import SUPPORTED, CanonicalLayout, Case, Support, unsupported

INNER_K_TILES = 8
"""Tiles of 16 inputs that tinygemm packs together: K must be a multiple of 128."""

_INT_MM_ROWS = 17
"""cuBLASLt's int8 product refuses fewer rows."""


AMPERE = (8, 0)
"""Compute capability of the first GPUs whose tensor cores multiply bfloat16."""


def cuda_gpu(least: tuple[int, int] = (0, 0)) -> Support:
    """Whether there is a CUDA GPU of at least that compute capability, and a torch that uses it."""
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return unsupported("this torch is built without CUDA")
    if not torch.cuda.is_available():
        return unsupported("there is no CUDA GPU")
    capability = torch.cuda.get_device_capability()
    if capability < least:
        needed, found = (".".join(map(str, version)) for version in (least, capability))
        return unsupported(f"it needs compute capability {needed}, and this GPU has {found}")
    return SUPPORTED


class GpuKernel(ABC):
    """What kernels for NVIDIA GPUs have in common: any number of rows, and limits that can be asked without a GPU."""

    least: tuple[int, int] = AMPERE
    """Compute capability that it needs."""
    min_rows = 1
    max_rows: int | None = None

    @abstractmethod
    def fits(self, case: Case) -> Support:
        """Whether the case is within the kernel's limits, on a machine that has the GPU."""

    def available(self) -> Support:
        """See `Kernel.available`."""
        return cuda_gpu(self.least)

    def supports(self, case: Case) -> Support:
        """See `Kernel.supports`."""
        answer = self.fits(case)
        return self.available() if answer.ok else answer


def on_gpu(case: Case) -> Support:
    """Whether the weight is on a GPU, and the case one that can be computed."""
    if case.device != "cuda":
        return unsupported(f"it is for CUDA GPUs, and the weight is on {case.device}")
    return computable(case)


class Tinygemm(GpuKernel):
    """`aten._weight_int4pack_mm`: int4 weights in tensor-core tiles, dequantized (q - 8) * s + z on the way."""

    name = "tinygemm"
    layout = "tinygemm"
    formats = "int4, int3 and int2 weights (all read as 4 bits), groups of 32 to 256, bf16 scales, no or float zero point; bf16"

    def fits(self, case: Case) -> Support:
        """See `GpuKernel.fits`."""
        answer = on_gpu(case)
        if not answer.ok:
            return answer
        if case.format.activation is not None:
            return unsupported("it does not quantize activations")
        if case.dtype != torch.bfloat16:
            return unsupported(f"it takes bfloat16 activations, and these are {case.dtype}")
        answer = tinygemm_grid(case)
        if not answer.ok:
            return answer
        if case.n % 8:
            return unsupported(f"it takes multiples of 8 outputs, and N is {case.n}")
        if case.k % (INNER_K_TILES * 16):
            return unsupported(f"it takes multiples of {INNER_K_TILES * 16} inputs, and K is {case.k}")
        return SUPPORTED

    def prepack(self, weight: QuantizedWeight) -> tuple[Tensor, ...]:
        """See `Kernel.prepack`."""
        return pack_int4_cuda(paired(nibble_codes(weight)), INNER_K_TILES), scale_and_zero(weight)

    def unpack(self, tensors: tuple[Tensor, ...], case: Case) -> QuantizedWeight:
        """See `Kernel.unpack`; where the nibbles went is found as for `AtenInt4PackCpu`."""
        packed, scales = tensors
        total = case.n * case.k
        position = torch.arange(total, dtype=torch.int64, device=packed.device).reshape(case.n, case.k)
        origin = torch.zeros(total, dtype=torch.int64, device=packed.device)
        for shift in range(0, (total - 1).bit_length(), 4):
            digit = ((position >> shift) & 15).to(torch.uint8)
            origin |= int32_nibbles(pack_int4_cuda(paired(digit), INNER_K_TILES)) << shift
        codes = torch.empty(total, dtype=torch.uint8, device=packed.device)
        codes[origin] = int32_nibbles(packed).to(torch.uint8)
        return from_tinygemm(codes.reshape(case.n, case.k), scales, case)

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        """See `Kernel.linear`."""
        assert isinstance(case.format.weight, IntGrid)
        packed, scales = tensors
        group = case.format.weight.group_size or case.k
        y = int4_product_cuda(x.contiguous(), packed, group, scales)
        return y if bias is None else y + bias


class CudaIntMm(GpuKernel, CanonicalLayout):
    """`torch._int_mm` on tensor cores; fewer than 17 rows are padded with zeros, which the product needs and nothing sees."""

    name = "cuda-int-mm"
    formats = "int8 weights, one scale a row; symmetric int8 activations, dynamic or static"
    least = (0, 0)

    def fits(self, case: Case) -> Support:
        """See `GpuKernel.fits`."""
        answer = on_gpu(case)
        if not answer.ok:
            return answer
        if case.n % 8 or case.k % 8:
            return unsupported(f"it takes multiples of 8 inputs and outputs, and N is {case.n}, K is {case.k}")
        return int8_dynamic(case)

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        """See `Kernel.linear`."""
        rows = x.shape[0]
        if rows >= _INT_MM_ROWS:
            return int8_linear(x, tensors, bias, case)
        padded = torch.nn.functional.pad(x, (0, 0, 0, _INT_MM_ROWS - rows))
        return int8_linear(padded, tensors, bias, case)[:rows]


def paired(codes: Tensor) -> Tensor:
    """Pair codes uint8 [N, K] in [0, 15] -> bytes [N, K/2] with the even input in the high nibble, as tinygemm packs from."""
    return (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()


def int32_nibbles(packed: Tensor) -> Tensor:
    """Return the eight nibbles of int32 words in order, lowest first, flat int64."""
    words = packed.reshape(-1, 1).to(torch.int64)
    return ((words >> torch.arange(0, 32, 4, device=packed.device)) & 15).reshape(-1)
