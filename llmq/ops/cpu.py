"""The kernels made of the native library: one for each kind of linear, one packed tensor a weight, one call a linear."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmq.numerics.grid import Activation, FloatGrid, Grid, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight, torch_dtype
from llmq.ops import native, native_abi
from llmq.ops.nibbles import from_nibbles, is_nibble, nibble_codes
from llmq.ops.reference import computable
from llmq.ops.schema import SUPPORTED, Case, Support, unsupported

_LINEAR = torch.ops.llmq.native_linear.default  # resolving the overload at each call would take longer than the call
_ZEROS = {"none": native_abi.ZERO_NONE, "int": native_abi.ZERO_INT, "float": native_abi.ZERO_FLOAT}
_WEIGHT_DTYPES = {torch.bfloat16: native_abi.WEIGHT_BF16, torch.float32: native_abi.WEIGHT_F32}
_PLAIN = (native_abi.ZERO_NONE, native_abi.SCALE_NONE, native_abi.ACTIVATION_FLOAT)
_IDLE_EPS = 1.0
"""Where activations are not quantized nobody reads it."""


def linear_struct(case: Case, stored: tuple[Tensor, ...] = (), bias: Tensor | None = None) -> native_abi.LlmqLinear:
    """Return what the native library calls this linear.

    Args:
        case: one that a native kernel supports.
        stored: its weight in the native layout, what `NativeLinear.prepack` returned, which the caller keeps alive; none: no
            address.
        bias: fp32 [N], contiguous, or None; the caller keeps it alive.
    """
    addresses = (stored[0].data_ptr() if stored else None, None if bias is None else bias.data_ptr())
    numbers, eps = _format(case)
    input_scale = stored[1].item() if len(stored) > 1 else 0.0
    return native_abi.LlmqLinear(*numbers, eps, input_scale, *addresses)


@dataclass(frozen=True)
class NativeLinear:
    """One kind of linear, by `llmq_linear`; bit for bit the same whatever the number of threads and the rows beside a row.

    Attributes:
        name: see `Kernel.name`.
        formats: see `Kernel.formats`.
        weight: what its weights are in the library (native_abi.WEIGHT_*).
        refuses: says why a case is not of this kind; None: it is.
    """

    name: str
    formats: str
    weight: int
    refuses: Callable[[Case], str | None]
    min_rows: int = 1
    max_rows: int | None = None

    @property
    def layout(self) -> str:
        """See `Kernel.layout`. The name of the packing, which differs between instruction sets."""
        status = native.status()
        return f"native-{native.kernels().layout(self.weight)}" if isinstance(status, native.Available) else self.name

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
        refusal = self.refuses(case)
        if refusal:
            return unsupported(refusal)
        if case.k > native.LARGEST_K:
            return unsupported(f"it takes up to {native.LARGEST_K} inputs, and K is {case.k}")
        return computable(case)

    def prepack(self, weight: QuantizedWeight) -> tuple[Tensor, ...]:
        """See `Kernel.prepack`: codes, scales and zero points in one tensor; scales as fp32 or bf16, which is exact.

        The scale of a static input is a second tensor.
        """
        linear = _weight_struct(weight.grid, *weight.shape)
        if isinstance(weight.grid, FloatGrid):
            return (native.kernels().pack(weight.qdata, None, None, linear),)
        codes = nibble_codes(weight) if is_nibble(weight.grid) else weight.codes()
        packed = native.kernels().pack(codes, weight.scale, weight.zero_point, linear)
        return (packed,) if weight.input_scale is None else (packed, weight.input_scale)

    def unpack(self, tensors: tuple[Tensor, ...], case: Case) -> QuantizedWeight:
        """See `Kernel.unpack`."""
        grid = case.format.weight
        linear = _weight_struct(grid, case.n, case.k)
        if isinstance(grid, FloatGrid):
            numbers = torch.empty(case.n, case.k, dtype=torch_dtype(grid.dtype))
            native.kernels().unpack(tensors[0], numbers, None, None, linear)
            return QuantizedWeight.from_float(numbers)
        assert isinstance(grid, IntGrid)  # supports()
        entries = (case.n, grid.groups(case.k))
        codes = torch.empty(case.n, case.k, dtype=torch.int8 if grid.bits == 8 else torch.uint8)
        scale = torch.empty(entries)
        zero = None if grid.zero_point == "none" else torch.empty(entries)
        native.kernels().unpack(tensors[0], codes, scale, zero, linear)
        scale_dtype = torch_dtype(grid.scale_dtype)
        if zero is not None:
            zero = zero.to(torch.uint8 if grid.zero_point == "int" else scale_dtype)
        make = from_nibbles if is_nibble(grid) else QuantizedWeight.from_codes
        weight = make(grid, codes, scale.to(scale_dtype), zero)
        return replace(weight, input_scale=tensors[1]) if case.format.has_input_scale else weight

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        """See `Kernel.linear`."""
        numbers, eps = _format(case)
        y: Tensor = _LINEAR(x, tensors[0], bias, numbers, eps, *tensors[1:])
        return y


def _int8_dynamic(case: Case) -> str | None:
    if case.format.activation is None or not case.format.activation.symmetric:
        return "it takes symmetric int8 activations"
    return _not_int8(case) or _unfit_eps(case.format.activation)


def _int8_weight_only(case: Case) -> str | None:
    return _not_bf16(case) or _not_int8(case)


def _int4(case: Case) -> str | None:
    return _not_bf16(case) or _not_int4(case)


def _int8_dynamic_int4(case: Case) -> str | None:
    if case.format.activation is None:
        return "it takes int8 activations"
    return _not_int4(case) or _unfit_eps(case.format.activation)


def _bf16(case: Case) -> str | None:
    return _not_float(case, torch.bfloat16)


def _fp32(case: Case) -> str | None:
    return _not_float(case, torch.float32)


def _not_float(case: Case, dtype: torch.dtype) -> str | None:
    grid = case.format.weight
    if not isinstance(grid, FloatGrid):
        return "the weight is quantized"
    if case.format.activation is not None:
        return "the activations are quantized"
    if torch_dtype(grid.dtype) != dtype or case.dtype != dtype:
        return f"it takes {dtype} weights and activations, and these are {grid.dtype} and {case.dtype}"
    return None


def _not_bf16(case: Case) -> str | None:
    """Activations of 8 significant bits are what 16-bit block floating point holds next to exactly; others it would round."""
    if case.format.activation is not None:
        return "the activations are quantized"
    return None if case.dtype == torch.bfloat16 else f"it takes bfloat16 activations, and these are {case.dtype}"


def _not_int8(case: Case) -> str | None:
    grid = case.format.weight
    if not isinstance(grid, IntGrid) or grid.bits != 8 or not grid.symmetric:
        return "it takes symmetric 8-bit weights"
    return _unfit_group(grid)


def _not_int4(case: Case) -> str | None:
    grid = case.format.weight
    if not isinstance(grid, IntGrid) or not is_nibble(grid):
        return "it takes weights of 2 to 4 bits"
    return _unfit_group(grid)


def _unfit_group(grid: IntGrid) -> str | None:
    if grid.group_size is None or grid.group_size % 8 == 0:
        return None
    return f"it takes groups of a multiple of 8 inputs, or one a row, and these are of {grid.group_size}"


def _unfit_eps(activation: Activation) -> str | None:
    if activation.static or torch.finfo(torch.float32).smallest_normal <= activation.eps < float("inf"):
        return None
    return f"it takes an eps that is a normal positive fp32 number, and this is {activation.eps}"


@functools.lru_cache(maxsize=1024)
def _format(case: Case) -> tuple[native.Format, float]:
    """Return the library's numbers for a case, and the smallest scale of its quantized activations."""
    grid, activation = case.format.weight, case.format.activation
    if isinstance(grid, FloatGrid):
        return (case.n, case.k, case.k, _WEIGHT_DTYPES[case.dtype], *_PLAIN), _IDLE_EPS
    assert isinstance(grid, IntGrid)  # supports()
    kind = native_abi.ACTIVATION_FLOAT
    if activation is not None:
        kind = native_abi.ACTIVATION_INT8 if activation.symmetric else native_abi.ACTIVATION_UINT8
        kind = native_abi.ACTIVATION_STATIC if activation.static else kind
    weight = native_abi.WEIGHT_INT8 if grid.bits == 8 else native_abi.WEIGHT_INT4
    scale = native_abi.SCALE_BF16 if grid.scale_dtype == "bfloat16" else native_abi.SCALE_F32
    numbers = (case.n, case.k, grid.group_size or case.k, weight, _ZEROS[grid.zero_point], scale, kind)
    return numbers, _IDLE_EPS if activation is None else activation.eps


def _weight_struct(grid: Grid, n: int, k: int) -> native_abi.LlmqLinear:
    """Return the linear of a weight alone: how it is packed does not depend on the activations."""
    dtype = torch_dtype(grid.dtype) if isinstance(grid, FloatGrid) else torch.bfloat16
    numbers, eps = _format(Case(LinearFormat(grid), n, k, dtype, "cpu"))
    return native_abi.LlmqLinear(*numbers, eps)


NATIVE_KERNELS = (
    NativeLinear(
        "native-int8-dynamic",
        "int8 weights, symmetric; symmetric int8 activations, a token or static",
        native_abi.WEIGHT_INT8,
        _int8_dynamic,
    ),
    NativeLinear(
        "native-int8-dynamic-int4",
        "int4, int3 and int2 weights (all read as 4 bits) by group, no or integer zero points; int8 activations",
        native_abi.WEIGHT_INT4,
        _int8_dynamic_int4,
    ),
    NativeLinear("native-int8", "int8 weights, symmetric; bf16", native_abi.WEIGHT_INT8, _int8_weight_only),
    NativeLinear(
        "native-int4",
        "int4, int3 and int2 weights (all read as 4 bits) by group, all kinds of zero points; bf16",
        native_abi.WEIGHT_INT4,
        _int4,
    ),
    NativeLinear("native-bf16", "unquantized bf16", native_abi.WEIGHT_BF16, _bf16),
    NativeLinear("native-fp32", "unquantized fp32", native_abi.WEIGHT_F32, _fp32),
)
"""One a kind of linear."""
