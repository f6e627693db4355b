"""Codes of 2 and 3 bits as 4-bit ones: the same numbers, the way back, and the same results as the int4 weight has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_cases import INT8, case_of, make_weight, make_x

from llmq.errors import UsageError
from llmq.numerics.grid import FloatGrid, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.ops.nibbles import from_nibbles, is_nibble, nibble_codes
from llmq.ops.select import candidates
from llmq.ops.tensor import QuantizedTensor

GRIDS = [
    IntGrid(bits, group, symmetric=zero == "none", zero_point=zero, scale_dtype="bfloat16")
    for bits in (2, 3, 4)
    for group in (None, 32)
    for zero in ("none", "int", "float")
]


def as_int4(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight on the 4-bit grid of its kind."""
    grid = replace(weight.grid, bits=4)
    codes = nibble_codes(weight)
    own = codes.to(torch.int8) - 8 if grid.symmetric else codes
    return QuantizedWeight.from_codes(grid, own, weight.scale, weight.zero_point)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_means_the_same_numbers_and_comes_back(grid):
    weight = make_weight(LinearFormat(grid), 9, 96)
    wide = as_int4(weight)
    assert torch.equal(wide.dequantize(torch.float64), weight.dequantize(torch.float64))
    back = from_nibbles(grid, nibble_codes(weight), weight.scale, weight.zero_point)
    for ours, theirs in zip(weight.tensors, back.tensors, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.bits < 4], ids=str)
@pytest.mark.parametrize("activation", [None, INT8])
def test_every_int4_kernel_computes_what_it_does_for_the_int4_weight(grid, activation):
    narrow, wide = LinearFormat(grid, activation), LinearFormat(replace(grid, bits=4), activation)
    weight = make_weight(narrow, 48, 96)
    x = make_x(5, 96, torch.bfloat16)
    takes = {}
    for form in (narrow, wide):
        case = case_of(form, 48, 96, torch.bfloat16)
        takes[form] = {kernel.name: kernel for kernel, support in candidates(case) if support.ok}
    assert takes[narrow].keys() == takes[wide].keys()
    for name, kernel in takes[narrow].items():
        case = case_of(narrow, 48, 96, torch.bfloat16)
        y = kernel.linear(x, kernel.prepack(weight), None, case)
        y4 = kernel.linear(x, kernel.prepack(as_int4(weight)), None, replace(case, format=wide))
        assert torch.equal(y, y4), name


def test_what_is_read_is_counted_as_it_is_laid_out():
    form = LinearFormat(IntGrid(3, 128, scale_dtype="bfloat16"))
    tensor = QuantizedTensor.from_weight(make_weight(form, 32, 256), form)
    assert tensor.nbytes_stored == 32 * (256 * 3 // 8 + 2 * 2)
    chosen = [kernel for kernel, support in candidates(tensor.spec.case) if support.ok and kernel.layout.endswith("int4-n16k8")]
    for kernel in chosen:
        assert tensor.with_kernels(kernel.layout, (kernel.name,)).nbytes_stored == 32 * (256 * 4 // 8 + 2 * 2)


def test_other_grids_are_refused():
    for grid in (IntGrid(5, 32), FloatGrid("bfloat16")):
        assert not is_nibble(grid)
        with pytest.raises(UsageError, match="2 to 4 bits"):
            nibble_codes(make_weight(LinearFormat(grid), 4, 32))
    with pytest.raises(UsageError, match="2 to 4 bits"):
        from_nibbles(IntGrid(8), torch.zeros(1, 4, dtype=torch.uint8), torch.ones(1, 1), None)
