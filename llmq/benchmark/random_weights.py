"""Weights for measuring kernels: what they hold costs no kernel more or less time, and every code and group can be told apart."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmq.numerics.float8 import NAN_CODE
from llmq.numerics.grid import Float8Grid, FloatGrid
from llmq.numerics.weight import QuantizedWeight, torch_dtype
from llmq.ops.schema import Case


def random_weight(case: Case, generator: torch.Generator) -> QuantizedWeight:
    """Return a weight [N, K] with every code equally likely, and scales and zero points that all differ."""
    grid = case.format.weight
    if isinstance(grid, FloatGrid):
        numbers = torch.randn(case.n, case.k, generator=generator) / case.k**0.5
        return QuantizedWeight.from_float(numbers.to(torch_dtype(grid.dtype)))
    if isinstance(grid, Float8Grid):
        patterns = torch.randint(NAN_CODE, (case.n, case.k), generator=generator, dtype=torch.uint8)
        patterns |= torch.randint(2, patterns.shape, generator=generator, dtype=torch.uint8) << 7
        scale = (0.5 + torch.rand(case.n, 1, generator=generator)) / (64 * case.k**0.5)
        return QuantizedWeight.from_codes(grid, patterns.view(torch.float8_e4m3fn), scale.to(torch_dtype(grid.scale_dtype)))
    code_dtype = torch.int8 if grid.symmetric else torch.uint8
    codes = torch.randint(grid.qmin, grid.qmax + 1, (case.n, case.k), generator=generator, dtype=code_dtype)
    entries = (case.n, grid.groups(case.k))
    scale = (0.5 + torch.rand(entries, generator=generator)) / (grid.mid * case.k**0.5)
    zero_point: Tensor | None = None
    if grid.zero_point == "int":
        zero_point = torch.randint(grid.qmin, grid.qmax + 1, entries, generator=generator, dtype=torch.uint8)
    elif grid.zero_point == "float":
        zero_point = (torch.randn(entries, generator=generator) * scale).to(torch_dtype(grid.scale_dtype))
    weight = QuantizedWeight.from_codes(grid, codes, scale.to(torch_dtype(grid.scale_dtype)), zero_point)
    # what calibration might find for normally distributed inputs
    return replace(weight, input_scale=torch.full((1,), 4.0 / 127)) if case.format.has_input_scale else weight
