"""Round to nearest: every weight becomes the closest point of its group's grid, whatever the inputs are.

The scale (and a floating zero point) is chosen from the group's range in fp32 and rounded to the grid's scale dtype first;
only then are the codes chosen. So the codes are the nearest ones of the grid that is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import UsageError
from llmq.numerics.affine import (
    MappingType,
    ZeroPointDomain,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)
from llmq.numerics.float8 import DTYPE as FLOAT8
from llmq.numerics.float8 import float8_scale, round_to_float8
from llmq.numerics.grid import CodeGrid, Float8Grid, IntGrid
from llmq.numerics.weight import QuantizedWeight, torch_dtype

PANEL_ROWS = 256
"""Rows of a weight that are copied in the dtype to compute in at a time."""


def quantize_rtn(weight: Tensor, grid: CodeGrid, *, mapping: MappingType | None = None) -> QuantizedWeight:
    """Round a weight to the nearest points of a grid.

    Args:
        weight: [N, K], floating point.
        grid: an integer or a float8 grid.
        mapping: how a group's range is laid over integer codes; None: SYMMETRIC for a symmetric grid, ASYMMETRIC otherwise. Of
            float8 codes the largest is always that of a row's largest magnitude.

    Returns:
        The quantized weight.

    Raises:
        ShapeError: when the weight does not fit the grid.
        UsageError: when mapping and grid contradict each other.
    """
    if isinstance(grid, Float8Grid):
        if mapping is not None:
            raise UsageError(f"a float8 grid has no mapping, got {mapping.value}; leave it out.")
        return _float8(weight, grid)
    scale, zero_point = choose_scales(weight, grid, mapping=mapping)
    return QuantizedWeight.from_codes(grid, round_to_grid(weight, grid, scale, zero_point), scale, zero_point)


def work_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype to compute in: fp64 for fp64, else fp32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def choose_scales(weight: Tensor, grid: IntGrid, *, mapping: MappingType | None = None) -> tuple[Tensor, Tensor | None]:
    """Choose scale and zero point of every group from its range.

    Args:
        weight: [N, K], floating point.
        grid: the integer grid.
        mapping: see `quantize_rtn`.

    Returns:
        Scale [N, groups] of the grid's scale dtype, and zero point [N, groups] (uint8, or of the scale dtype; None for a
        symmetric grid), as they are stored.

    Raises:
        ShapeError: when the weight does not fit the grid.
        UsageError: when mapping and grid contradict each other.
    """
    n, k = weight.shape
    grid.check(n, k)
    mapping = mapping or (MappingType.SYMMETRIC if grid.symmetric else MappingType.ASYMMETRIC)
    if grid.symmetric == (mapping is MappingType.ASYMMETRIC):
        raise UsageError(f"a {'symmetric' if grid.symmetric else 'asymmetric'} grid cannot be filled by mapping {mapping.value}.")
    domain = ZeroPointDomain(grid.zero_point)
    scale_dtype = torch_dtype(grid.scale_dtype)
    scales, zero_points = [], []
    for rows in torch.split(weight, PANEL_ROWS):
        scale, zero_point = choose_qparams_affine(
            rows.to(work_dtype(rows)),
            mapping,
            (1, grid.group_size or k),
            quant_min=grid.qmin,
            quant_max=grid.qmax,
            eps=torch.finfo(scale_dtype).smallest_normal,  # a group of zeros keeps a scale that its dtype can hold
            scale_dtype=scale_dtype,
            zero_point_dtype=scale_dtype if domain is ZeroPointDomain.FLOAT else torch.uint8,
            zero_point_domain=domain,
            preserve_zero=domain is not ZeroPointDomain.FLOAT,
        )
        scales.append(scale)
        zero_points += [] if zero_point is None else [zero_point]
    return torch.cat(scales), torch.cat(zero_points) if zero_points else None


def round_to_grid(weight: Tensor, grid: IntGrid, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return the codes [N, K] (int8 for a symmetric grid, else uint8) nearest to `weight` [N, K], computed in `work_dtype`."""
    dtype = work_dtype(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8 if grid.symmetric else torch.uint8, device=weight.device)
    for start in range(0, len(weight), PANEL_ROWS):
        rows = slice(start, start + PANEL_ROWS)
        codes[rows] = quantize_affine(
            weight[rows].to(dtype),
            _blocks(weight, scale),
            scale[rows].to(dtype),
            None if zero_point is None else zero_point[rows].to(dtype),
            output_dtype=codes.dtype,
            quant_min=grid.qmin,
            quant_max=grid.qmax,
            zero_point_domain=ZeroPointDomain(grid.zero_point),
        )
    return codes


def numbers_of(codes: Tensor, grid: IntGrid, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the numbers [N, K] that codes [N, K] mean, computed in `dtype`."""
    return dequantize_affine(
        codes,
        _blocks(codes, scale),
        scale.to(dtype),
        None if zero_point is None else zero_point.to(dtype),
        quant_min=grid.qmin,
        quant_max=grid.qmax,
        zero_point_domain=ZeroPointDomain(grid.zero_point),
        output_dtype=dtype,
    )


def _float8(weight: Tensor, grid: Float8Grid) -> QuantizedWeight:
    scale_dtype = torch_dtype(grid.scale_dtype)
    codes = torch.empty(weight.shape, dtype=FLOAT8, device=weight.device)
    scales = []
    for start in range(0, len(weight), PANEL_ROWS):
        rows = weight[start : start + PANEL_ROWS]
        absmax = rows.abs().amax(dim=1, keepdim=True)
        scales.append(float8_scale(absmax, torch.finfo(scale_dtype).smallest_normal).to(scale_dtype))
        codes[start : start + PANEL_ROWS] = round_to_float8(rows, scales[-1].float())
    return QuantizedWeight.from_codes(grid, codes, torch.cat(scales))


def _blocks(matrix: Tensor, scale: Tensor) -> tuple[int, int]:
    """The block size that gives `scale` [n, g] one entry a block of `matrix` [N, K]."""
    return matrix.shape[0] // scale.shape[0], matrix.shape[1] // scale.shape[1]
