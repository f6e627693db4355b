"""torch's own low-bit CPU matrix products, each behind the guards it lacks. The only user of torch's private operators.

The operators check little: a wrong K, or activations that do not start on a 32-byte boundary, give garbage or a segmentation
fault. The guards that depend on a run-time address live in operators of our own (`llmq::int8pack_linear`,
`llmq::int4pack_linear`), so that they also hold inside a compiled graph.

The 16-bit result is rounded before the bias is added, so with a bias these kernels round twice.
"""
# ruff: noqa: SLF001 - the private operators are this file's subject

from __future__ import annotations

import torch
from torch import Tensor

from llmq.numerics.grid import IntGrid
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.features import aten_capability, has_int8_dot, is_x86
from llmq.ops.nibbles import from_nibbles, is_nibble, nibble_codes
from llmq.ops.reference import computable, finish, quantize_activation
from llmq.ops.schema import SUPPORTED, CanonicalLayout, Case, Support, unsupported

ALIGNMENT_BYTES = 64
INT4_GROUP_SIZES = (32, 64, 128, 256)

_LIBRARY = torch.library.Library("llmq", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("int8pack_linear(Tensor x, Tensor weight, Tensor scale) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.define("int4pack_linear(Tensor x, Tensor packed, Tensor scale_and_zero, int group_size) -> Tensor")  # type: ignore[no-untyped-call]


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor contiguous and starting on a cache line, copied only when it is not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT_BYTES else tensor


def _int8pack_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply x bf16 [M, K], weight int8 [N, K], scale bf16 [N] -> bf16 [M, N]."""
    return torch.ops.aten._weight_int8pack_mm(aligned(x), weight, scale)  # type: ignore[no-any-return]


def _int8pack_linear_fake(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], weight.shape[0])


def _int4pack_linear(x: Tensor, packed: Tensor, scale_and_zero: Tensor, group_size: int) -> Tensor:
    """Multiply x bf16 [M, K], packed uint8 [N, K/2], scale_and_zero bf16 [K/G, N, 2] -> bf16 [M, N]."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(aligned(x), packed, group_size, scale_and_zero)  # type: ignore[no-any-return]


def _int4pack_linear_fake(x: Tensor, packed: Tensor, scale_and_zero: Tensor, group_size: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], packed.shape[0])


_LIBRARY.impl("int8pack_linear", _int8pack_linear, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("int4pack_linear", _int4pack_linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("llmq::int8pack_linear", _int8pack_linear_fake, lib=_LIBRARY)
torch.library.register_fake("llmq::int4pack_linear", _int4pack_linear_fake, lib=_LIBRARY)


def _vectorised() -> Support:
    if not is_x86():
        return unsupported("its guards are known for x86 only")
    if aten_capability() not in {"AVX2", "AVX512"}:
        return unsupported(f"it is vectorised for AVX2 and AVX512, and torch runs {aten_capability()} here")
    return SUPPORTED


class AtenInt8Pack(CanonicalLayout):
    """`aten._weight_int8pack_mm`: x (int8 W)^T, scaled by output, fp32 sums, in blocks of 4 x 4. Reads the canonical codes."""

    name = "aten-int8pack"
    formats = "int8 weights, one bf16 scale a row; bf16 activations"
    min_rows = 1
    max_rows: int | None = 63  # from there on dequantizing and an fp32 product are faster

    def available(self) -> Support:
        """See `Kernel.available`."""
        return _vectorised()

    def supports(self, case: Case) -> Support:
        """See `Kernel.supports`."""
        answer = _weight_only(case, self.available())
        if not answer.ok:
            return answer
        grid = case.format.weight
        if not isinstance(grid, IntGrid) or grid.bits != 8 or not grid.symmetric or grid.groups(case.k) != 1:
            return unsupported("it takes symmetric 8-bit weights with one scale a row")
        if grid.scale_dtype != "bfloat16":
            return unsupported(f"it takes bfloat16 scales, and rounding these {grid.scale_dtype} ones would change the weights")
        step = 16 if aten_capability() == "AVX512" else 8
        if case.k % step:
            return unsupported(f"it reads inputs {step} at a time without a tail, and K is {case.k}")
        return SUPPORTED

    def prepack(self, weight: QuantizedWeight) -> tuple[Tensor, ...]:
        """See `Kernel.prepack`."""
        return tuple(aligned(tensor) for tensor in weight.tensors)

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:  # noqa: ARG002
        """See `Kernel.linear`."""
        weight, scale = tensors
        y: Tensor = torch.ops.llmq.int8pack_linear(x, weight, scale.reshape(-1))
        return y if bias is None else y + bias


class AtenInt4PackCpu:
    """`aten._weight_int4pack_mm_for_cpu`: dequantizes (q - 8) * s + z in registers, fp32 sums.

    The packed bytes differ between instruction sets, so they live in memory only, and the layout carries the set's name.
    """

    name = "aten-int4pack-cpu"
    formats = "int4, int3 and int2 weights (all read as 4 bits), groups of 32 to 256, bf16 scales, no or float zero point; bf16"
    min_rows = 1
    max_rows: int | None = None

    @property
    def layout(self) -> str:
        """See `Kernel.layout`."""
        return f"int4pack-{aten_capability().lower()}"

    def available(self) -> Support:
        """See `Kernel.available`."""
        return _vectorised()

    def supports(self, case: Case) -> Support:
        """See `Kernel.supports`."""
        answer = _weight_only(case, self.available())
        if not answer.ok:
            return answer
        answer = tinygemm_grid(case)
        if not answer.ok:
            return answer
        if case.n % 16:
            return unsupported(f"it takes multiples of 16 outputs, and N is {case.n}")
        return SUPPORTED

    def prepack(self, weight: QuantizedWeight) -> tuple[Tensor, ...]:
        """See `Kernel.prepack`."""
        packed = _pack_int4_cpu(nibble_codes(weight))
        return aligned(packed), aligned(scale_and_zero(weight))

    def unpack(self, tensors: tuple[Tensor, ...], case: Case) -> QuantizedWeight:
        """See `Kernel.unpack`.

        Packing only moves nibbles, so packing the positions themselves, one hexadecimal digit at a time, shows where each
        nibble came from, whatever the instruction set's order is.
        """
        packed, scales = tensors
        position = torch.arange(case.n * case.k, dtype=torch.int64).reshape(case.n, case.k)
        origin = torch.zeros(case.n * case.k, dtype=torch.int64)
        for shift in range(0, (case.n * case.k - 1).bit_length(), 4):
            moved = _pack_int4_cpu((position >> shift) & 15)
            origin |= _nibbles(moved).to(torch.int64) << shift
        codes = torch.empty(case.n * case.k, dtype=torch.uint8)
        codes[origin] = _nibbles(packed)
        return from_tinygemm(codes.reshape(case.n, case.k), scales, case)

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        """See `Kernel.linear`."""
        assert isinstance(case.format.weight, IntGrid)
        y: Tensor = torch.ops.llmq.int4pack_linear(x, *tensors, case.format.weight.group_size)
        return y if bias is None else y + bias


class AtenIntMm(CanonicalLayout):
    """`torch._int_mm`: exact int8 products, through oneDNN where the CPU has VNNI."""

    name = "aten-int-mm"
    formats = "int8 weights, one scale a row; symmetric int8 activations, dynamic or static"
    min_rows = 1
    max_rows: int | None = None

    def available(self) -> Support:
        """See `Kernel.available`."""
        if not has_int8_dot():
            return unsupported("this CPU has no AVX-512 VNNI, and without it torch multiplies int8 one element at a time")
        return SUPPORTED

    def supports(self, case: Case) -> Support:
        """See `Kernel.supports`."""
        answer = self.available()
        if not answer.ok:
            return answer
        if case.device != "cpu":
            return unsupported(f"it is for CPUs, and the weight is on {case.device}")
        return int8_dynamic(case)

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        """See `Kernel.linear`."""
        return int8_linear(x, tensors, bias, case)


def int8_linear(x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
    """Quantize the rows of x, multiply with `torch._int_mm`, scale by row and by output.

    Args:
        x: [M, K].
        tensors: int8 codes [N, K], scale [N, 1] and, where activations are static, their scale [1].
        bias: [N] or None.
        case: gives the activation grid and the dtype of the result.

    Returns:
        [M, N] of `case.dtype`; a row with a NaN or an infinity is NaN.
    """
    assert case.format.activation is not None
    weight, weight_scale, *static = tensors
    codes, scale = quantize_activation(x, case.format.activation, *static)
    poison = (codes * 0).sum(dim=1, keepdim=True)  # NaN where a code is NaN, else 0: int8 could not carry it
    acc = torch._int_mm(torch.nan_to_num(codes).to(torch.int8), weight.T)
    return finish((acc.float() + poison) * scale * weight_scale.float().T, bias, case.dtype)


def int8_dynamic(case: Case) -> Support:
    """Whether the format is int8 weights with one scale a row and symmetric int8 activations."""
    grid, activation = case.format.weight, case.format.activation
    if activation is None or not activation.symmetric:
        return unsupported("it takes symmetric int8 activations")
    if not isinstance(grid, IntGrid) or grid.bits != 8 or not grid.symmetric or grid.groups(case.k) != 1:
        return unsupported("it takes symmetric 8-bit weights with one scale a row")
    return computable(case)


def float8_product(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Multiply float8 matrices with `torch._scaled_mm`, scaled by row and by output.

    Without fast accumulation: with it, tensor cores add up the whole of K in registers of 14 bits.

    Args:
        codes: float8_e4m3fn [M, K], contiguous.
        scale: fp32 [M, 1], contiguous.
        weight: float8_e4m3fn [N, K], contiguous.
        weight_scale: fp32 [N, 1].

    Returns:
        bf16 [M, N].
    """
    other = weight_scale.reshape(1, -1)
    return torch._scaled_mm(codes, weight.T, scale, other, out_dtype=torch.bfloat16, use_fast_accum=False)


def tinygemm_grid(case: Case) -> Support:
    """Whether the weight is (q - 8) * s + z with bf16 s and z, exactly, in groups the tinygemm kernels know."""
    grid = case.format.weight
    if not isinstance(grid, IntGrid) or not is_nibble(grid):
        return unsupported("it takes weights of 2 to 4 bits")
    if grid.zero_point == "int":
        return unsupported("it takes symmetric weights or float zero points; an integer zero point times a bf16 scale is rounded")
    if grid.scale_dtype != "bfloat16":
        return unsupported(f"it takes bfloat16 scales, and rounding these {grid.scale_dtype} ones would change the weights")
    group = grid.group_size or case.k
    if group not in INT4_GROUP_SIZES:
        return unsupported(f"it takes groups of {', '.join(map(str, INT4_GROUP_SIZES))}, and these have {group}")
    return SUPPORTED


def scale_and_zero(weight: QuantizedWeight) -> Tensor:
    """Return tinygemm's [K/G, N, 2]: the scale, and the number at code 8 (0 for a symmetric weight)."""
    assert weight.scale is not None
    zero = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
    return torch.stack([weight.scale, zero], dim=-1).transpose(0, 1).contiguous()


def from_tinygemm(codes: Tensor, scales: Tensor, case: Case) -> QuantizedWeight:
    """Inverse of `nibble_codes` and `scale_and_zero`."""
    grid = case.format.weight
    assert isinstance(grid, IntGrid)
    scale, zero = (part.contiguous() for part in scales.transpose(0, 1).unbind(-1))
    return from_nibbles(grid, codes, scale, None if grid.symmetric else zero)


def pack_int4_cuda(pairs: Tensor, inner_k_tiles: int) -> Tensor:
    """Lay pairs of codes, uint8 [N, K/2] with the even input in the high nibble, out for tinygemm: int32, 4-D."""
    return torch.ops.aten._convert_weight_to_int4pack(pairs, inner_k_tiles)  # type: ignore[no-any-return]


def int4_product_cuda(x: Tensor, packed: Tensor, group_size: int, scales: Tensor) -> Tensor:
    """Multiply x bf16 [M, K] by what `pack_int4_cuda` and `scale_and_zero` returned -> bf16 [M, N]."""
    return torch.ops.aten._weight_int4pack_mm(x, packed, group_size, scales)  # type: ignore[no-any-return]


def _pack_int4_cpu(codes: Tensor) -> Tensor:
    """Pack codes [N, K] in [0, 15] -> uint8 [N, K/2] in this instruction set's order."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)  # type: ignore[no-any-return]


def _nibbles(packed: Tensor) -> Tensor:
    """Return the nibbles of uint8 bytes in order, low first, flat."""
    flat = packed.reshape(-1)
    return torch.stack([flat & 15, flat >> 4], dim=-1).reshape(-1)


def _weight_only(case: Case, available: Support) -> Support:
    """Whether a bf16 weight-only CPU kernel is in its element."""
    if not available.ok:
        return available
    if case.device != "cpu":
        return unsupported(f"it is for CPUs, and the weight is on {case.device}")
    if case.format.activation is not None:
        return unsupported("it does not quantize activations")
    if case.dtype != torch.bfloat16:
        return unsupported(f"it is vectorised for bfloat16 only, and the activations are {case.dtype}")
    return computable(case)
