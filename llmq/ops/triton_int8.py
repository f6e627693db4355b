"""Kernels with int8 activations for NVIDIA GPUs, written in Triton: int8 weights, and weights of 2 to 4 bits in groups.

What they compute and how they are cut is in `kernels/triton/int8.py` and `int8_int4.py`; here are the operators, which also serve
in compiled graphs and CUDA graphs (nothing waits for the device), the packing, and the limits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llmq.numerics.grid import ActivationGrid, IntGrid
from llmq.numerics.weight import QuantizedWeight
from llmq.ops import triton_support
from llmq.ops.aten import int8_dynamic
from llmq.ops.cuda import on_gpu
from llmq.ops.nibbles import MIDDLE, from_nibbles, is_nibble, nibble_codes
from llmq.ops.schema import SUPPORTED, CanonicalLayout, Case, Support, unsupported

PANEL = 16
"""Outputs that lie together; `kernels/triton/int8_int4.py` has the layout."""
CHUNKS = (128, 64, 32)
"""Inputs that a matrix instruction of int8 takes at once: multiples of 32."""

_LIBRARY = torch.library.Library("llmq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "triton_int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? input_scale, Tensor? bias, float eps) -> Tensor"
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "triton_int8_int4_linear(Tensor x, Tensor[] weight, Tensor? zero, Tensor? sums, Tensor? input_scale, Tensor? bias, float eps)"
    " -> Tensor"
)


def _machine(device: torch.device) -> tuple[int, int]:
    """Return how many multiprocessors there are, and bytes of shared memory for a program."""
    return triton_support.multiprocessors(device), triton_support.shared_memory(device)


def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Multiply the quantized rows of x [M, K] by int8 [N, K] with scales [N, 1] -> [M, N] of x's dtype."""
    triton_support.check_device(x)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    kernels = triton_support.load("int8")
    how = kernels.launch(x.shape[0], *weight.shape, *_machine(x.device))
    y: Tensor = kernels.linear(x, weight, scale, input_scale, bias, eps, how)
    return y


def _int8_linear_fake(
    x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor | None, bias: Tensor | None, eps: float  # noqa: ARG001
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], weight.shape[0])


def _int8_int4_linear(
    x: Tensor,
    weight: list[Tensor],
    zero: Tensor | None,
    sums: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Multiply the quantized rows of x [M, K] by packed weights, `weight` = (codes, scales) -> [M, N] of x's dtype."""
    triton_support.check_device(x)
    packed, scale = weight
    n = scale.shape[1]
    if x.shape[0] == 0:
        return x.new_empty(0, n)
    kernels = triton_support.load("int8_int4")
    how = kernels.launch(x.shape[0], n, (packed.shape[1], packed.shape[3]), *_machine(x.device))
    y: Tensor = kernels.linear(x, kernels.Weight(packed, scale, zero, sums), input_scale, bias, eps, how)
    return y


def _int8_int4_linear_fake(
    x: Tensor,
    weight: list[Tensor],
    zero: Tensor | None,  # noqa: ARG001
    sums: Tensor | None,  # noqa: ARG001
    input_scale: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    eps: float,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape[0], weight[1].shape[1])


for _name, _real, _fake in (
    ("triton_int8_linear", _int8_linear, _int8_linear_fake),
    ("triton_int8_int4_linear", _int8_int4_linear, _int8_int4_linear_fake),
):
    triton_support.register(_LIBRARY, _name, _real, _fake)


class TritonInt8Dynamic(triton_support.TritonKernel, CanonicalLayout):
    """int8 x int8 on tensor cores, summed and scaled in registers; up to 4 rows of x are quantized by the product itself."""

    name = "triton-int8-dynamic"
    formats = "int8 weights, one scale a row; symmetric int8 activations, dynamic or static"

    def fits(self, case: Case) -> Support:
        """See `GpuKernel.fits`."""
        answer = on_gpu(case)
        if not answer.ok:
            return answer
        if case.k % 16:
            return unsupported(f"it reads 16 inputs at a time, from addresses that are multiples of 16, and K is {case.k}")
        return int8_dynamic(case)

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        """See `Kernel.linear`."""
        assert isinstance(case.format.activation, ActivationGrid)
        weight, scale, *static = tensors
        y: Tensor = torch.ops.llmq.triton_int8_linear(
            x, weight, scale, static[0] if static else None, bias, case.format.activation.eps
        )
        return y


class TritonInt8DynamicInt4(triton_support.TritonKernel):
    """int8 x int4 on tensor cores: exact sums of a group, or of a part of it, each scaled in fp32."""

    name = "triton-int8-dynamic-int4"
    layout = "triton-int4-pairs"
    formats = "int4, int3 and int2 weights (all read as 4 bits), integer zero points or none; int8 activations of every kind"

    def fits(self, case: Case) -> Support:
        """See `GpuKernel.fits`."""
        grid = case.format.weight
        if not isinstance(case.format.activation, ActivationGrid):
            return unsupported("it takes int8 activations")
        if not isinstance(grid, IntGrid) or not is_nibble(grid):
            return unsupported("it takes weights of 2 to 4 bits")
        answer = on_gpu(case)
        if not answer.ok:
            return answer
        group = grid.group_size or case.k
        if group % CHUNKS[-1]:
            return unsupported(f"it takes groups of a multiple of {CHUNKS[-1]} inputs, and these have {group}")
        return SUPPORTED

    def prepack(self, weight: QuantizedWeight) -> tuple[Tensor, ...]:
        """Return packed codes, scales [groups, N] and, where there are some, zero points [groups, N], sums and the input scale.

        The sums of each chunk's weights, less their zero points, are for activations with a zero point. The weight does not know
        whether its activations have one, so static ones alone, which never do, go without.
        """
        assert weight.scale is not None
        codes = nibble_codes(weight)
        scale = weight.scale.T.contiguous()
        zero = None if weight.zero_point is None else weight.zero_point.T.contiguous()
        parts = [pack_pairs(codes, _chunk(weight.grid, weight.shape[1])), scale, zero]
        if weight.input_scale is None:
            parts.append(chunk_sums(codes, weight.zero_point, _chunk(weight.grid, weight.shape[1])))
        return tuple(part for part in (*parts, weight.input_scale) if part is not None)

    def unpack(self, tensors: tuple[Tensor, ...], case: Case) -> QuantizedWeight:
        """See `Kernel.unpack`."""
        grid = case.format.weight
        assert isinstance(grid, IntGrid)
        packed, scale, zero, _, input_scale = _named(tensors, case)
        codes = unpack_pairs(packed, case.n, case.k)
        plain = from_nibbles(grid, codes, scale.T.contiguous(), None if zero is None else zero.T.contiguous())
        return QuantizedWeight(grid, plain.shape, plain.qdata, plain.scale, plain.zero_point, input_scale)

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        """See `Kernel.linear`."""
        activation = case.format.activation
        assert isinstance(activation, ActivationGrid)
        packed, scale, zero, sums, input_scale = _named(tensors, case)
        needed = None if activation.symmetric else sums
        y: Tensor = torch.ops.llmq.triton_int8_int4_linear(x, [packed, scale], zero, needed, input_scale, bias, activation.eps)
        return y


def pack_pairs(codes: Tensor, chunk: int) -> Tensor:
    """Lay codes uint8 [N, K] in [0, 15] out in pairs of chunks.

    Returns:
        uint8 [N / 16, K / (2 chunk), 16, chunk], quotients rounded up: byte j of a row has input j of the pair's first chunk in
        its low nibble and input j of the second in its high one, less 8 and in two's complement. Padding is 0.
    """
    n, k = codes.shape
    signed = F.pad(codes ^ MIDDLE, (0, -k % (2 * chunk), 0, -n % PANEL))
    halves = signed.reshape(-(-n // PANEL), PANEL, -1, 2, chunk)
    return (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).transpose(1, 2).contiguous()


def unpack_pairs(packed: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `pack_pairs`: codes uint8 [n, k]."""
    rows = packed.transpose(1, 2)
    halves = torch.stack([rows & 15, rows >> 4], dim=3)
    return (halves.reshape(rows.shape[0] * PANEL, -1)[:n, :k] ^ MIDDLE).contiguous()


def chunk_sums(codes: Tensor, zero_point: Tensor | None, chunk: int) -> Tensor:
    """Return the sums of the weights of each chunk, less their zero points: int16 [K / chunk, N]; at most 128 times 15."""
    n, k = codes.shape
    sums = codes.reshape(n, k // chunk, chunk).sum(dim=2, dtype=torch.int32)
    if zero_point is None:
        zero = torch.full_like(sums, MIDDLE)
    else:
        zero = zero_point.to(torch.int32).repeat_interleave(k // chunk // zero_point.shape[1], dim=1)
    return (sums - chunk * zero).to(torch.int16).T.contiguous()


def _chunk(grid: object, k: int) -> int:
    """Return the longest chunk that divides a group."""
    assert isinstance(grid, IntGrid)
    group = grid.group_size or k
    return next(chunk for chunk in CHUNKS if group % chunk == 0)


def _named(tensors: tuple[Tensor, ...], case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return codes, scales, zero points, sums, input scale: what `prepack` returned, with None for what the format lacks."""
    grid, static = case.format.weight, case.format.has_input_scale
    left = iter(tensors)
    packed, scale = next(left), next(left)
    zero = next(left) if isinstance(grid, IntGrid) and grid.zero_point == "int" else None
    return packed, scale, zero, None if static else next(left), next(left) if static else None
