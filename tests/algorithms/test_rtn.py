"""Round to nearest: nearest on the grid that is stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.algorithms.report import LayerReport, sqnr_db
from llmq.algorithms.rtn import choose_scales, numbers_of, quantize_rtn
from llmq.errors import ShapeError, UsageError
from llmq.numerics.affine import MappingType
from llmq.numerics.grid import IntGrid
from llmq.numerics.weight import torch_dtype

GRIDS = [
    IntGrid(bits, group, symmetric=zero == "none", zero_point=zero, scale_dtype=dtype)
    for bits in (2, 4, 8)
    for group in (None, 32)
    for zero in ("none", "int", "float")
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_code_is_the_nearest_of_the_stored_grid(grid: IntGrid) -> None:
    weight = torch.randn(6, 64) * 0.1 + 0.02
    quantized = quantize_rtn(weight, grid)
    assert quantized.scale is not None
    assert quantized.scale.dtype == torch_dtype(grid.scale_dtype)
    error = (weight - quantized.dequantize()).abs()
    codes = torch.arange(grid.qmin, grid.qmax + 1, dtype=torch.int8 if grid.symmetric else torch.uint8)
    for code in codes:  # no other code of the grid is nearer
        other = numbers_of(
            torch.full((6, 64), int(code), dtype=codes.dtype), grid, quantized.scale, quantized.zero_point, torch.float32
        )
        assert (error <= (weight - other).abs() + 1e-6).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.sampled_from(GRIDS), st.floats(1e-4, 1e3))
def test_error_is_at_most_half_a_step_but_for_rounded_scales(seed: int, grid: IntGrid, size: float) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * size
    quantized = quantize_rtn(weight, grid)
    assert quantized.scale is not None
    step = quantized.scale.float().repeat_interleave(64 // quantized.scale.shape[1], 1)
    # a scale rounded to bf16 moves the last code by up to 2^-9 of the range, a float zero by 2^-9 of itself
    slack = 0.5 + (2.0**grid.bits * 2**-8 if grid.scale_dtype == "bfloat16" else 1e-3)
    assert ((weight - quantized.dequantize()).abs() <= slack * step * 1.001).all()


def test_the_two_symmetric_conventions() -> None:
    weight = torch.tensor([[-1.0, 0.5, 0.75, 0.25]])
    grid = IntGrid(4, None)
    clipping, _ = choose_scales(weight, grid, mapping=MappingType.SYMMETRIC)
    exact, _ = choose_scales(weight, grid, mapping=MappingType.SYMMETRIC_NO_CLIPPING_ERR)
    assert clipping.item() == pytest.approx(1 / 7.5)
    assert exact.item() == pytest.approx(1 / 8)


def test_zero_groups_and_fp64() -> None:
    for grid in GRIDS:
        weight = torch.randn(4, 64, dtype=torch.float64)
        weight[1] = 0
        weight[2, :32] = 0
        quantized = quantize_rtn(weight, grid)
        numbers = quantized.dequantize(torch.float64)
        assert torch.isfinite(numbers).all()
        assert numbers[1].abs().max() < 1e-30
        assert (numbers[2, :32].abs().max() < 1e-30) or grid.group_size is None


def test_misfits() -> None:
    with pytest.raises(ShapeError, match="group sizes that fit: 32"):
        quantize_rtn(torch.randn(4, 96), IntGrid(4, 64))
    with pytest.raises(UsageError, match="symmetric grid cannot be filled by mapping asymmetric"):
        quantize_rtn(torch.randn(4, 64), IntGrid(4, 64), mapping=MappingType.ASYMMETRIC)
    with pytest.raises(UsageError, match="asymmetric grid cannot be filled by mapping symmetric"):
        quantize_rtn(torch.randn(4, 64), IntGrid(4, 64, symmetric=False, zero_point="int"), mapping=MappingType.SYMMETRIC)


def test_sqnr() -> None:
    weight = torch.ones(2, 2)
    assert sqnr_db(weight, weight * 0.9) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(weight, weight) is None
    assert sqnr_db(torch.zeros(2, 2), weight) is None


def test_report_as_json_has_no_time_in_it() -> None:
    report = LayerReport("a.b", (4, 64), 20.0, loss=1.0, rtn_loss=2.0, damping=0.01, seconds=3.0)
    data = report.to_json()
    assert "seconds" not in data
    assert LayerReport.from_json(data) == LayerReport("a.b", (4, 64), 20.0, loss=1.0, rtn_loss=2.0, damping=0.01)
