"""Float8: every pattern, torch's own casts, the nearest number by hand, torchao; and weights and formats made of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmq.algorithms.rtn import quantize_rtn
from llmq.errors import ShapeError, UsageError
from llmq.numerics.affine import MappingType
from llmq.numerics.float8 import DTYPE, float8_numbers, float8_scale, has_nan, round_to_float8
from llmq.numerics.grid import ActivationGrid, Float8Activation, Float8Grid, FloatGrid, IntGrid, LinearFormat, format_from_json
from llmq.numerics.weight import QuantizedWeight, same_bits, torch_dtype

PATTERNS = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(DTYPE)
ONE = torch.ones(1)


def value(pattern: int) -> float:
    """What a pattern means, from its fields."""
    sign, exponent, mantissa = -1.0 if pattern & 128 else 1.0, (pattern >> 3) & 15, pattern & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def nearest(x: float) -> int:
    """The pattern nearest to x, the even one of two, found by trying all."""
    magnitude = min(abs(x), 448.0)
    best = min(range(127), key=lambda pattern: (abs(value(pattern) - magnitude), pattern & 1))
    return best | (128 if torch.signbit(torch.tensor(x)) else 0)


def test_every_pattern_means_what_its_fields_say():
    numbers = float8_numbers(PATTERNS)
    expected = torch.tensor([value(pattern) for pattern in range(256)])
    assert torch.equal(numbers.isnan(), expected.isnan())
    assert same_bits(numbers.nan_to_num(0.0), expected.nan_to_num(0.0))  # -0 included
    assert same_bits(numbers.nan_to_num(0.0), PATTERNS.float().nan_to_num(0.0))
    assert [pattern for pattern in range(256) if has_nan(PATTERNS[pattern : pattern + 1])] == [127, 255]


def test_rounds_to_the_nearest_even_and_saturates():
    middles = [(value(pattern) + value(pattern + 1)) / 2 for pattern in range(126)]
    around = [middle * (1 + side * 2.0**-20) for middle in middles for side in (-1, 0, 1)]
    x = torch.tensor([*around, 0.0, 2.0**-11, 447.9, 448.0, 449.0, 463.9, 464.0, 480.0, 1e30, float("inf")])
    x = torch.cat([x, -x])
    codes = round_to_float8(x, ONE)
    assert codes.view(torch.uint8).tolist() == [nearest(each) for each in x.tolist()]
    inside = x.abs() <= 448
    assert same_bits(codes[inside], x[inside].to(DTYPE))
    assert has_nan(round_to_float8(torch.tensor([1.0, float("nan")]), ONE))


def test_scales():
    absmax = torch.tensor([448.0, 1.0, 0.0, 1e-30, float("inf"), float("nan")])
    scale = float8_scale(absmax, 1e-12)
    assert scale[:4].tolist() == pytest.approx([1.0, 1 / 448, 1e-12, 1e-12])
    assert scale[4].isinf()
    assert scale[5].isnan()
    x = torch.tensor([[3.0, 0.0, -5.0]])
    assert float8_numbers(round_to_float8(x, torch.zeros(1, 1))).tolist() == [[0.0, 0.0, 0.0]]  # all codes mean 0
    turned = float8_numbers(round_to_float8(x, torch.tensor([[-2.0]])))
    assert turned.tolist() == [[-1.5, 0.0, 2.5]]


@pytest.mark.parametrize("block", [(1, 96), (7, 96)])
def test_equals_torchao(block):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]
    scale = primitives._choose_scale_float8(x, block)
    codes = primitives._quantize_affine_float8(x, scale, DTYPE)
    ours = float8_scale(x.abs().amax(dim=1, keepdim=True) if block[0] == 1 else x.abs().max().reshape(1, 1), 1e-12)
    assert torch.equal(ours, scale)
    assert same_bits(round_to_float8(x, ours), codes)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_rounded_for_the_scale_that_is_stored(scale_dtype):
    weight = torch.randn(300, 33, generator=torch.Generator().manual_seed(1))  # more than a panel of rows
    weight[5] = 0
    weight[6] *= 2.0**-20
    grid = Float8Grid(scale_dtype)
    quantized = quantize_rtn(weight, grid)
    assert quantized.scale.dtype == torch_dtype(scale_dtype)
    assert quantized.scale.shape == (300, 1)
    step = quantized.scale.float()
    assert step[5] == torch.finfo(quantized.scale.dtype).smallest_normal
    exact = (weight.abs().amax(dim=1, keepdim=True) / 448).clamp(min=step[5].item())
    assert torch.equal(quantized.scale, exact.to(quantized.scale.dtype))
    assert same_bits(quantized.qdata, (weight / step).clamp(-448, 448).to(DTYPE))
    numbers = quantized.dequantize()
    assert torch.equal(numbers, quantized.qdata.float() * step)
    assert torch.equal(numbers[5], torch.zeros(33))
    # half a unit of three bits of mantissa, or of the subnormal codes
    rows = [row for row in range(300) if row not in (5, 6)]
    error = (numbers - weight).abs()[rows]
    assert (error <= weight.abs()[rows] * 2.0**-4 + step[rows] * 2.0**-10).all()
    assert quantized.bits_per_weight == grid.bits_per_weight(33)
    assert LinearFormat(grid).nbytes(300, 33) == quantized.nbytes


def test_goes_with_what_a_weight_can_do():
    weight = quantize_rtn(torch.randn(6, 40, generator=torch.Generator().manual_seed(2)), Float8Grid())
    assert weight.codes() is weight.qdata
    wide = weight.dequantize(torch.float64)
    assert torch.equal(wide, weight.qdata.double() * weight.scale.double())
    assert torch.equal(weight.rows(2, 5).dequantize(), weight.dequantize()[2:5])
    assert weight.to("meta").qdata.is_meta
    assert [tensor.shape for tensor in weight.tensors] == [(6, 40), (6, 1)]
    room = QuantizedWeight.empty(Float8Grid("bfloat16"), 6, 40)
    assert (room.qdata.dtype, room.scale.dtype, room.zero_point) == (DTYPE, torch.bfloat16, None)


def test_weights_that_cannot_be():
    weight = quantize_rtn(torch.randn(4, 8), Float8Grid())
    with pytest.raises(UsageError, match=r"qdata must be torch.float8_e4m3fn, got torch.uint8"):
        replace(weight, qdata=weight.qdata.view(torch.uint8))
    with pytest.raises(ShapeError, match=r"scale must have shape \[4, 1\], got \[1, 1\]"):
        replace(weight, scale=weight.scale[:1])
    with pytest.raises(UsageError, match="a weight on a float8 grid needs a scale"):
        replace(weight, scale=None)
    with pytest.raises(UsageError, match="neither a zero point nor an input scale"):
        replace(weight, zero_point=weight.scale)
    with pytest.raises(UsageError, match="neither a zero point nor an input scale"):
        replace(weight, input_scale=torch.ones(1))
    with pytest.raises(UsageError, match="a float8 grid has no mapping, got symmetric"):
        quantize_rtn(torch.randn(4, 8), Float8Grid(), mapping=MappingType.SYMMETRIC)


@pytest.mark.parametrize(
    "form",
    [
        LinearFormat(Float8Grid("bfloat16")),
        LinearFormat(Float8Grid(), Float8Activation()),
        LinearFormat(Float8Grid(), Float8Activation("tensor", eps=1e-6)),
        LinearFormat(IntGrid(8), ActivationGrid()),
        LinearFormat(FloatGrid("float16")),
    ],
)
def test_formats_come_back(form):
    assert format_from_json(form.to_json()) == form
    assert form.quantized == (not isinstance(form.weight, FloatGrid))


def test_formats_that_cannot_be():
    with pytest.raises(UsageError, match="only go with each other"):
        LinearFormat(Float8Grid(), ActivationGrid())
    with pytest.raises(UsageError, match="only go with each other"):
        LinearFormat(IntGrid(8), Float8Activation())
    with pytest.raises(UsageError, match="only go with each other"):
        LinearFormat(FloatGrid("bfloat16"), Float8Activation())
    with pytest.raises(UsageError, match="only go with each other"):
        LinearFormat(Float8Grid(), ActivationGrid(static=True))
    with pytest.raises(UsageError, match="one scale a 'row' or a 'tensor', got 'group'"):
        Float8Activation("group")
    with pytest.raises(UsageError, match="kind int, float8 or float, got 'float4'"):
        format_from_json({"weight": {"kind": "float4"}, "activation": None})
