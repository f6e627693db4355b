"""Linears for the native library's tests, and the header's definition of them in torch: slow, and exact to the last bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmq.numerics.grid import ActivationGrid, FloatGrid, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.ops import native, native_abi
from llmq.ops.check import Exact, exact_linear
from llmq.ops.native_abi import (
    ACTIVATION_FLOAT,
    ACTIVATION_INT8,
    ACTIVATION_STATIC,
    ACTIVATION_UINT8,
    SCALE_BF16,
    SCALE_F32,
    WEIGHT_INT4,
    WEIGHT_INT8,
    ZERO_FLOAT,
    ZERO_INT,
    ZERO_NONE,
    LlmqLinear,
)
from llmq.ops.schema import Case

EPS = 1e-5
INPUT_SCALE = 0.0073
"""Of static activations: what is beyond 0.927 is clamped."""
BLOCK = 256
LARGEST_CODE = 32639
KINDS = {
    "int8": (WEIGHT_INT8, ZERO_NONE, ACTIVATION_FLOAT),
    "int8 x int8": (WEIGHT_INT8, ZERO_NONE, ACTIVATION_INT8),
    "int4": (WEIGHT_INT4, ZERO_NONE, ACTIVATION_FLOAT),
    "int4 - int": (WEIGHT_INT4, ZERO_INT, ACTIVATION_FLOAT),
    "int4 + float": (WEIGHT_INT4, ZERO_FLOAT, ACTIVATION_FLOAT),
    "int4 x int8": (WEIGHT_INT4, ZERO_NONE, ACTIVATION_INT8),
    "int4 - int x int8": (WEIGHT_INT4, ZERO_INT, ACTIVATION_INT8),
    "int4 x uint8": (WEIGHT_INT4, ZERO_NONE, ACTIVATION_UINT8),
    "int4 - int x uint8": (WEIGHT_INT4, ZERO_INT, ACTIVATION_UINT8),
    "int8 x static": (WEIGHT_INT8, ZERO_NONE, ACTIVATION_STATIC),
    "int4 x static": (WEIGHT_INT4, ZERO_NONE, ACTIVATION_STATIC),
    "int4 - int x static": (WEIGHT_INT4, ZERO_INT, ACTIVATION_STATIC),
}
"""Every kind of linear with integer weights: weight, zero point, activation."""


def instruction_sets() -> tuple[str, ...]:
    """Every instruction set that runs here; 'none', which a fixture turns into a skip, without the library."""
    status = native.status()
    return status.features if isinstance(status, native.Available) else ("none",)


@dataclass(frozen=True, eq=False)
class Linear:
    """A weight [N, K] as `Kernels.pack` takes it, with its bias [N]."""

    numbers: native.Format
    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    bias: Tensor

    @property
    def struct(self) -> LlmqLinear:
        """What the library calls it."""
        return LlmqLinear(*self.numbers, EPS, INPUT_SCALE)

    @property
    def input_scale(self) -> Tensor | None:
        """The scale of its input, where that is part of the linear."""
        return torch.tensor([INPUT_SCALE]) if self.numbers[-1] == ACTIVATION_STATIC else None

    def pack(self, kernels: native.Kernels) -> Tensor:
        """Lay it out for an instruction set."""
        return kernels.pack(self.codes, self.scale, self.zero, self.struct)

    def times(self, kernels: native.Kernels, x: Tensor, *, bias: bool = False) -> Tensor:
        """Multiply natively."""
        return self.multiply(kernels, x, self.pack(kernels), self.bias if bias else None)

    def multiply(self, kernels: native.Kernels, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """The same with a weight that is packed."""
        return kernels.linear(x, packed, bias, self.numbers, EPS, self.input_scale)


def make_linear(kind: str, n: int, k: int, group: int, scale: int = SCALE_BF16) -> Linear:
    """Codes over the whole grid, rows at its ends, scales of both signs and of very different size, a scale of 0."""
    generator = torch.Generator().manual_seed(n * 31 + k + group)
    weight, zero, activation = KINDS[kind]
    low, high = (-128, 128) if weight == WEIGHT_INT8 else (0, 16)
    codes = torch.randint(low, high, (n, k), generator=generator)
    codes[0] = low
    codes[-1, ::2] = high - 1
    entries = (n, k // group)
    numbers = torch.randn(entries, generator=generator) * 2.0 ** torch.randint(-6, 3, entries, generator=generator)
    numbers[n // 2, 0] = 0
    zeros = None
    if zero == ZERO_INT:
        zeros = torch.randint(0, 16, entries, generator=generator).float()
    elif zero == ZERO_FLOAT:
        zeros = as_stored(torch.randn(entries, generator=generator), scale)
    return Linear(
        (n, k, group, weight, zero, scale, activation),
        codes.to(torch.int8 if weight == WEIGHT_INT8 else torch.uint8),
        as_stored(numbers, scale),
        zeros,
        torch.randn(n, generator=generator),
    )


def make_float_linear(dtype: torch.dtype, n: int, k: int) -> Linear:
    """An unquantized weight, a row of zeros in it."""
    generator = torch.Generator().manual_seed(n * 31 + k)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    weight[n // 2] = 0
    kind = native_abi.WEIGHT_BF16 if dtype == torch.bfloat16 else native_abi.WEIGHT_F32
    numbers = (n, k, k, kind, ZERO_NONE, native_abi.SCALE_NONE, ACTIVATION_FLOAT)
    return Linear(numbers, weight, None, None, torch.randn(n, generator=generator))


def as_stored(numbers: Tensor, scale: int) -> Tensor:
    """fp32 numbers that the format can hold."""
    return numbers if scale == SCALE_F32 else numbers.bfloat16().float()


def make_x(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Rows of every kind that has gone wrong somewhere: see the branches."""
    generator = torch.Generator().manual_seed(seed * 7919 + m * 31 + k)
    x = torch.randn(m, k, generator=generator)
    for row in range(m):
        kind = row % 9
        if kind == 1:
            x[row] = 0
        elif kind == 2:  # outliers, beside which the other inputs of a block nearly vanish
            x[row, :: max(k // 3, 1)] *= 1e4
        elif kind == 3:  # subnormals and the smallest normals
            x[row] *= 2.0**-128
        elif kind == 4:  # blocks whose largest is at the edge of one step and the next
            x[row] = x[row].clamp(-1, 1)
            edges = float_of_bits(0x3FFEFF00 + (row // 9) % 3 - 1)
            x[row, ::8] = edges * (-1.0) ** (row // 27)
        elif kind == 5:  # zeros where there is a block, and only there
            x[row, : min(32, k - 1)] = 0
        elif kind == 6:  # the largest sums that there are
            x[row] = LARGEST_CODE * (-1.0) ** (row // 9)
        elif kind == 7:  # magnitudes over the whole range in which nothing overflows
            x[row] *= 2.0 ** torch.randint(-60, 60, (k,), generator=generator)
        elif kind == 8:  # one sign, far from 0: what a zero point is for
            x[row] = 3 + x[row].abs()
    return x.to(dtype)


def float_of_bits(bits: int) -> float:
    """The fp32 number of these bits."""
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()


def block_scale(largest: Tensor) -> Tensor:
    """The least power of two e from 2**-126 on with rint(largest / e) <= 32639, that is largest < 32639.5 e; else NaN.

    Args:
        largest: fp64, any shape.
    """
    powers = 2.0 ** torch.arange(-126, 128, dtype=torch.float64)
    at = torch.bucketize(largest.nan_to_num(posinf=0.0), powers * (LARGEST_CODE + 0.5), right=True)
    return torch.where(largest.isfinite(), powers[at], torch.nan)


def block_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """16-bit codes [M, size] and steps [M, 1] of one block, as fp64."""
    step = block_scale(x.abs().amax(dim=1, keepdim=True))
    return torch.where(step.isnan(), 0.0, torch.round(x / step)), step


def row_codes(x: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    """8-bit codes minus zero point, fp64 [M, K], and scales, fp32 [M, 1]; all of it in fp32, as the header has it."""
    x = x.float()
    zero: Tensor | float = 0.0
    if activation == ACTIVATION_STATIC:
        finite = x.isfinite().all(dim=1, keepdim=True)
        step = torch.tensor(INPUT_SCALE)
        return torch.where(finite, torch.clamp(torch.round(x * (1 / step)), -127, 127), 0.0).double(), torch.where(
            finite, step, torch.nan
        )
    if activation == ACTIVATION_INT8:
        low, scale = -127, x.abs().amax(dim=1, keepdim=True) / 127
    else:
        least, most = x.amin(dim=1, keepdim=True).clamp(max=0), x.amax(dim=1, keepdim=True).clamp(min=0)
        low, scale = -128, (most - least) / 255
    finite = x.isfinite().all(dim=1, keepdim=True) & scale.isfinite()
    scale = torch.where(finite, scale.clamp(min=EPS), torch.inf)
    if activation == ACTIVATION_UINT8:
        zero = torch.clamp(-128 - torch.round(least / scale), -128, 127)
    codes = torch.clamp(torch.round(x * (1 / scale)) + zero, low, 127) - zero
    return torch.where(finite, codes, 0.0).double(), scale


def by_definition(x: Tensor, linear: Linear, *, bias: bool = False) -> Tensor:
    """y as `llmq_cpu.h` defines it: exact integer sums, and fp32 operations one by one in the header's order."""
    n, k, group, weight, zero, _, activation = linear.numbers
    quantized = activation != ACTIVATION_FLOAT
    codes, row_scale = row_codes(x, activation) if quantized else (x.double(), None)
    one_sum = quantized and weight == WEIGHT_INT8 and group == k
    block = k if one_sum else min(group, BLOCK)
    w, middle = linear.codes.double(), 8 if weight == WEIGHT_INT4 else 0
    y = torch.zeros(x.shape[0], n)
    for begin in range(0, k if x.shape[0] else 0, group):
        scale = linear.scale[:, begin // group]
        offset = linear.zero[:, begin // group, None].double() if zero == ZERO_INT else middle
        for start in range(begin, begin + group, block):
            part = slice(start, min(start + block, begin + group))
            c, step = (codes[:, part], None) if quantized else block_codes(codes[:, part])
            sums = c @ (w[:, part] - offset).T
            assert sums.abs().max() < 2**31
            y = y + sums.float() * (scale if step is None else scale * step.float())
            if zero == ZERO_FLOAT:
                y = y + linear.zero[:, begin // group] * (c.sum(dim=1, keepdim=True).float() * step.float())
    y = y if row_scale is None else y * row_scale
    return (y + linear.bias if bias else y).to(x.dtype)


def canonical(linear: Linear) -> tuple[LinearFormat, QuantizedWeight]:
    """What llmq calls the linear: its format and its weight."""
    _, k, group, weight, zero, scale, activation = linear.numbers
    grids = {
        ACTIVATION_INT8: ActivationGrid(symmetric=True, eps=EPS),
        ACTIVATION_UINT8: ActivationGrid(symmetric=False, eps=EPS),
        ACTIVATION_STATIC: ActivationGrid(static=True),
    }
    if weight not in {WEIGHT_INT8, WEIGHT_INT4}:
        stored = QuantizedWeight.from_float(linear.codes)
        assert isinstance(stored.grid, FloatGrid)
        return LinearFormat(stored.grid), stored
    domain = ("none", "int", "float")[zero]
    scale_dtype = "bfloat16" if scale == SCALE_BF16 else "float32"
    grid = IntGrid(
        8 if weight == WEIGHT_INT8 else 4,
        None if group == k else group,
        symmetric=zero == ZERO_NONE,
        zero_point=domain,
        scale_dtype=scale_dtype,
    )
    codes = linear.codes
    if weight == WEIGHT_INT4 and zero == ZERO_NONE:
        codes = codes.to(torch.int8) - 8
    zeros = linear.zero
    if zeros is not None:
        zeros = zeros.to(torch.uint8 if zero == ZERO_INT else getattr(torch, scale_dtype))
    numbers = linear.scale.to(getattr(torch, scale_dtype))
    stored = QuantizedWeight.from_codes(grid, codes, numbers, zeros)
    return LinearFormat(grid, grids.get(activation)), replace(stored, input_scale=linear.input_scale)


def exact(x: Tensor, linear: Linear, *, bias: bool = False) -> Exact:
    """y in fp64, and how far a kernel may be from it."""
    format_, weight = canonical(linear)
    return exact_linear(x, weight, linear.bias if bias else None, Case(format_, *linear.numbers[:2], x.dtype, "cpu"))


def bits(y: Tensor) -> Tensor:
    """The bits of a result, all NaNs alike."""
    whole = torch.int32 if y.dtype == torch.float32 else torch.int16
    return torch.where(y.isnan(), torch.nan, y).view(whole)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal element by element; NaN equals NaN, and 0 equals -0."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
