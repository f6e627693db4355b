"""Formats, weights and comparisons shared by the tests of this room. The data is adversarial on purpose."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from llmq.numerics.float8 import NAN_CODE
from llmq.numerics.grid import ActivationGrid, Float8Activation, Float8Grid, FloatGrid, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight, torch_dtype
from llmq.ops.check import exact_linear, worst_element
from llmq.ops.schema import Case
from llmq.ops.tensor import QuantizedTensor

INT8, INT8_ASYMMETRIC = ActivationGrid(symmetric=True), ActivationGrid(symmetric=False)
INT8_STATIC = ActivationGrid(static=True)
FORMATS = {
    "int8-weight-only": LinearFormat(IntGrid(8, scale_dtype="bfloat16")),
    "int8-weight-only-fp32-scale": LinearFormat(IntGrid(8)),
    "int8-groups": LinearFormat(IntGrid(8, 32, scale_dtype="float16")),
    "int4": LinearFormat(IntGrid(4, 32, symmetric=False, zero_point="float", scale_dtype="bfloat16")),
    "int4-symmetric": LinearFormat(IntGrid(4, 64, scale_dtype="bfloat16")),
    "int4-integer-zero": LinearFormat(IntGrid(4, 32, symmetric=False, zero_point="int")),
    "int4-per-channel": LinearFormat(IntGrid(4, scale_dtype="bfloat16")),
    "int3": LinearFormat(IntGrid(3, 32)),
    "int3-float-zero": LinearFormat(IntGrid(3, 64, symmetric=False, zero_point="float", scale_dtype="bfloat16")),
    "int2": LinearFormat(IntGrid(2, 32, scale_dtype="bfloat16")),
    "int2-integer-zero": LinearFormat(IntGrid(2, 32, symmetric=False, zero_point="int", scale_dtype="bfloat16")),
    "int5": LinearFormat(IntGrid(5, 32)),
    "int8-dynamic": LinearFormat(IntGrid(8), INT8),
    "int8-dynamic-asymmetric-weight": LinearFormat(IntGrid(8, symmetric=False, zero_point="int"), INT8_ASYMMETRIC),
    "int8-dynamic-int4": LinearFormat(IntGrid(4, 32, scale_dtype="bfloat16"), INT8_ASYMMETRIC),
    "int8-dynamic-int3": LinearFormat(IntGrid(3, 32, scale_dtype="bfloat16"), INT8),
    "int8-static": LinearFormat(IntGrid(8), INT8_STATIC),
    "int4-static": LinearFormat(IntGrid(4, 64, symmetric=False, zero_point="int"), INT8_STATIC),
    "float8-weight-only": LinearFormat(Float8Grid("bfloat16")),
    "float8-dynamic": LinearFormat(Float8Grid(), Float8Activation()),
    "float8-dynamic-tensor": LinearFormat(Float8Grid("float16"), Float8Activation("tensor")),
    "bf16": LinearFormat(FloatGrid("bfloat16")),
    "fp16": LinearFormat(FloatGrid("float16")),
    "fp32": LinearFormat(FloatGrid("float32")),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_weight(format_: LinearFormat, n: int, k: int, seed: int = 0) -> QuantizedWeight:
    """Codes over the whole grid and both its ends, a group of zeros; scales of both signs, far from 1, one 0, one subnormal."""
    generator = torch.Generator().manual_seed(seed)
    grid = format_.weight
    if isinstance(grid, FloatGrid):
        weight = torch.randn(n, k, generator=generator)
        weight[-1] = 0
        return QuantizedWeight.from_float(weight.to(torch_dtype(grid.dtype)))
    float8 = isinstance(grid, Float8Grid)
    low, high, middle = (0, NAN_CODE, 1 << 10) if float8 else (grid.qmin, grid.qmax + 1, grid.mid)
    codes = torch.randint(low, high, (n, k), generator=generator)
    codes[0, 0], codes[0, -1] = low, high - 1
    codes[-1, : grid.group_size or k] = 0
    if float8:  # every pattern of a number, -0 included
        codes |= torch.randint(2, (n, k), generator=generator) << 7
    scale = (0.6 * torch.rand(n, grid.groups(k), generator=generator) + 0.05) * 8 / middle
    scale[:, ::2] *= 2**-5
    scale[::3] *= -1
    if n > 4:
        scale[2, 0], scale[3, -1] = 0, 5 * 2.0**-131
    scale = scale.to(torch_dtype(grid.scale_dtype))
    zero = None
    if float8:
        return QuantizedWeight.from_codes(grid, codes.to(torch.uint8).view(torch.float8_e4m3fn), scale)
    if grid.zero_point == "int":
        zero = torch.randint(0, grid.qmax + 1, scale.shape, generator=generator).to(torch.uint8)
    elif grid.zero_point == "float":
        zero = torch.randn(scale.shape, generator=generator).to(scale.dtype)
    weight = QuantizedWeight.from_codes(grid, codes.to(torch.int8 if grid.symmetric else torch.uint8), scale, zero)
    return replace(weight, input_scale=torch.tensor([0.021])) if format_.has_input_scale else weight  # clamps from 2.67 on


def make_x(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Both signs, rows of very different size, a row of zeros."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    if m > 2:
        x[1] = 0
        x[2] *= 100
    return x.to(dtype)


def case_of(format_: LinearFormat, n: int, k: int, dtype: torch.dtype, device: str = "cpu") -> Case:
    return Case(format_, n, k, dtype, device)


def quantized_linear(name: str, n: int, k: int, dtype: torch.dtype, *, bias: bool = False) -> nn.Linear:
    """An nn.Linear whose weight is a QuantizedTensor of the named format."""
    linear = nn.Linear(k, n, bias=bias, dtype=dtype).requires_grad_(requires_grad=False)
    tensor = QuantizedTensor.from_weight(make_weight(FORMATS[name], n, k), FORMATS[name], dtype)
    linear.weight = nn.Parameter(tensor, requires_grad=False)
    return linear


def assert_kernel_close(y: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, case: Case, kernel: str) -> None:
    """Every element within the bound that rounding explains; says which is worst and by how much."""
    assert y.shape == (x.shape[0], case.n)
    assert y.dtype == case.dtype
    worst = worst_element(y, exact_linear(x, weight, bias, case))
    assert worst is None, f"{kernel} [{case.n}, {case.k}] x {list(x.shape)}: {worst}"
