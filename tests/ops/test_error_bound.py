"""The error bound is wide enough for honest rounding and too narrow for one wrong code, scale or column."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_cases import FORMATS, case_of, make_weight, make_x

from llmq.ops.check import exact_linear, worst_element
from llmq.ops.reference import Reference


def results(name: str, dtype: torch.dtype):
    format_ = FORMATS[name]
    case, weight, x = case_of(format_, 16, 128, dtype), make_weight(format_, 16, 128), make_x(5, 128, dtype)
    return case, weight, x, Reference().linear(x, weight.tensors, None, case)


@pytest.mark.parametrize("name", ["int4", "int4-integer-zero", "int8-weight-only", "int8-dynamic", "int8-dynamic-int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_catches_one_wrong_scale(name, dtype):
    case, weight, x, y = results(name, dtype)
    assert worst_element(y, exact_linear(x, weight, None, case)) is None
    scale = weight.scale.clone()
    scale[5] = scale[5] * 1.05  # one row, five per cent
    wrong = exact_linear(x, replace(weight, scale=scale), None, case)
    report = worst_element(y, wrong)
    assert report is not None
    assert "columns [5]" in report


def test_catches_one_wrong_element_and_names_it():
    case, weight, x, y = results("int8-weight-only", torch.bfloat16)
    exact = exact_linear(x, weight, None, case)
    y[3, 7] *= 1.02
    assert worst_element(y, exact).startswith("element (3, 7) is ")
    y[3, 7] = float("nan")
    assert worst_element(y, exact).startswith("element (3, 7) is nan")


def test_swapped_columns_do_not_pass():
    case, weight, x, y = results("int4", torch.bfloat16)
    assert worst_element(y[:, [1, 0, *range(2, 16)]], exact_linear(x, weight, None, case)) is not None


def test_the_bound_is_a_few_roundings_of_the_result():
    case, weight, x, _ = results("int8-weight-only", torch.bfloat16)
    exact = exact_linear(x, weight, None, case)
    typical = exact.y.abs().mean()
    assert exact.bound.mean() < typical * 2**-7  # bf16 has 8 bits
