"""QuantizedWeight: codes and bytes agree with the grid, and what does not belong together is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmq.errors import ShapeError, UsageError
from llmq.numerics.grid import ActivationGrid, FloatGrid, IntGrid, LinearFormat, format_from_json
from llmq.numerics.weight import QuantizedWeight, torch_dtype

GRIDS = [
    IntGrid(bits, group, symmetric=zero == "none", zero_point=zero, scale_dtype=scale)
    for bits in (2, 3, 4, 5, 8)
    for group in (None, 8)
    for zero in ("none", "int", "float")
    for scale in ("float32", "bfloat16", "float16")
]


def random_weight(grid: IntGrid, n: int = 4, k: int = 16) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (n, k), generator=generator).to(torch.int8 if grid.symmetric else torch.uint8)
    scale = (torch.rand(n, grid.groups(k), generator=generator) - 0.3).to(torch_dtype(grid.scale_dtype))
    zero = None
    if grid.zero_point == "int":
        zero = torch.randint(0, grid.qmax + 1, scale.shape, generator=generator).to(torch.uint8)
    elif grid.zero_point == "float":
        zero = torch.randn(scale.shape, generator=generator).to(scale.dtype)
    return QuantizedWeight.from_codes(grid, codes, scale, zero)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_means_what_the_grid_says_and_takes_the_bytes_it_says(grid):
    weight = random_weight(grid)
    n, k = weight.shape
    group = grid.group_size or k
    codes, numbers, wide = weight.codes().tolist(), weight.dequantize().tolist(), weight.dequantize(torch.float64)
    for row in range(n):
        for column in range(k):
            s = weight.scale[row, column // group].double()
            q = codes[row][column]
            if grid.zero_point == "none":
                exact = q * s
            elif grid.zero_point == "int":
                exact = (q - int(weight.zero_point[row, column // group])) * s
            else:
                exact = (q - grid.mid) * s + weight.zero_point[row, column // group].double()
            assert wide[row, column] == exact
            assert numbers[row][column] == pytest.approx(exact.item(), rel=2**-22, abs=1e-6)
    assert weight.bits_per_weight == pytest.approx(grid.bits_per_weight(k))
    assert torch.equal(weight.dequantize(torch.bfloat16), weight.dequantize().to(torch.bfloat16))
    assert torch.equal(weight.rows(1, 4).dequantize(), weight.dequantize()[1:4])


def test_an_input_scale_is_stored_and_goes_along():
    plain = random_weight(IntGrid(8, 8))
    weight = replace(plain, input_scale=torch.tensor([0.25]))
    assert weight.tensors == (*plain.tensors, weight.input_scale)
    assert weight.nbytes == plain.nbytes + 4
    assert torch.equal(weight.dequantize(), plain.dequantize())
    assert weight.rows(1, 3).input_scale is weight.input_scale
    assert weight.to("meta").input_scale.is_meta
    form = LinearFormat(plain.grid, ActivationGrid(static=True))
    assert form.nbytes(*weight.shape) == weight.nbytes
    assert LinearFormat(plain.grid, ActivationGrid()).nbytes(*weight.shape) == plain.nbytes
    assert format_from_json(form.to_json()) == form
    assert format_from_json({**form.to_json(), "activation": {"symmetric": True, "eps": 1e-5}}).activation == ActivationGrid()


def test_input_scales_that_cannot_be():
    plain = random_weight(IntGrid(8, 8))
    with pytest.raises(ShapeError, match=r"input scale must have shape \[1\], got \[\]"):
        replace(plain, input_scale=torch.tensor(0.25))
    with pytest.raises(UsageError, match=r"input scale must be torch.float32, got torch.bfloat16"):
        replace(plain, input_scale=torch.ones(1, dtype=torch.bfloat16))
    with pytest.raises(UsageError, match="nor an input scale"):
        replace(QuantizedWeight.from_float(torch.zeros(2, 2)), input_scale=torch.ones(1))
    with pytest.raises(UsageError, match="no zero point; use symmetric=True"):
        ActivationGrid(symmetric=False, static=True)
    with pytest.raises(UsageError, match="need a weight of integer codes"):
        LinearFormat(FloatGrid("bfloat16"), ActivationGrid(static=True))


def test_a_float_grid_keeps_the_weight():
    tensor = torch.randn(3, 7, dtype=torch.bfloat16)
    weight = QuantizedWeight.from_float(tensor)
    assert weight.grid == FloatGrid("bfloat16")
    assert weight.qdata is tensor
    assert weight.bits_per_weight == 16
    assert torch.equal(weight.dequantize(torch.float64), tensor.double())
    with pytest.raises(UsageError, match="no codes"):
        weight.codes()
    with pytest.raises(UsageError, match="neither scale nor zero point"):
        QuantizedWeight(FloatGrid("bfloat16"), (3, 7), tensor, torch.ones(3, 1))


def test_refusals():
    grid = IntGrid(4, 8)
    codes, scale = torch.zeros(2, 16, dtype=torch.int8), torch.ones(2, 2)
    QuantizedWeight.from_codes(grid, codes, scale)
    with pytest.raises(UsageError, match=r"scale must be torch\.float32, got torch\.bfloat16"):
        QuantizedWeight.from_codes(grid, codes, scale.bfloat16())
    with pytest.raises(ShapeError, match=r"scale must have shape \[2, 2\], got \[2, 1\]"):
        QuantizedWeight.from_codes(grid, codes, scale[:, :1])
    with pytest.raises(UsageError, match="zero_point='none' has no zero point"):
        QuantizedWeight.from_codes(grid, codes, scale, scale)
    with pytest.raises(ShapeError, match="12 inputs cannot be cut into groups of 8"):
        QuantizedWeight.from_codes(grid, codes[:, :12], scale)
    with pytest.raises(UsageError, match="needs a scale"):
        QuantizedWeight(grid, (2, 16), torch.zeros(2, 8, dtype=torch.uint8))
    with pytest.raises(UsageError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        QuantizedWeight.from_float(torch.zeros(2, 2, dtype=torch.float64))
