"""Affine quantization by blocks: the only place in llmq where a number is rounded to a grid and clamped to its ends.

A block is the set of elements that share one scale and zero point, and `block_size` gives its length in every dimension:
the whole shape is per-tensor, `(1, K)` per output channel or per token, `(1, G)` per group of a row. Results have one entry
a block: a tensor of shape `[d0, d1]` cut into blocks `(b0, b1)` has scales of shape `[d0 / b0, d1 / b1]`.

With `s` the scale, `z` the zero point and `mid = (quant_max + quant_min + 1) / 2`, a code `q` means

    INT     (q - z) * s             q = clamp(round(x * (1 / s)) + z)
    NONE    q * s                   q = clamp(round(x * (1 / s)))
    FLOAT   (q - mid) * s + z       q = clamp(round((x - (z - s * mid)) / s))      (the tinygemm kernels' meaning)

Rounding is to nearest, ties to even. A scale may be any finite number: a negative one turns the grid round. With a scale of 0, or
so small that its reciprocal is infinite (up to 2**-128 in fp32), all codes mean one number as far as rounding is concerned, and
code z (FLOAT: 0) is taken. The arithmetic, down to the order of the operations and the reciprocal of the scale,
is that of torchao.quantization.quant_primitives, against which the tests compare every bit.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from llmq.errors import ShapeError, UsageError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class MappingType(Enum):
    """How the range of a block is laid over the codes."""

    SYMMETRIC = "symmetric"
    """Scale = max|x| / ((quant_max - quant_min) / 2): 127.5 for int8, so the positive extreme is clipped by half a step."""

    SYMMETRIC_NO_CLIPPING_ERR = "symmetric_no_clipping_err"
    """Scale = max(min / quant_min, max / quant_max): nothing is clipped."""

    ASYMMETRIC = "asymmetric"
    """Scale = (max - min) / (quant_max - quant_min)."""


class ZeroPointDomain(Enum):
    """What a zero point is: a code (INT), a real number (FLOAT), or absent (NONE)."""

    INT = "int"
    FLOAT = "float"
    NONE = "none"


def choose_qparams_affine(  # noqa: PLR0913 - the parameters of the mathematics, all but three by keyword
    input: Tensor,  # noqa: A002 - the name the field uses
    mapping_type: MappingType,
    block_size: tuple[int, ...],
    *,
    quant_min: int,
    quant_max: int,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
    preserve_zero: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Choose the scale and the zero point of every block from its smallest and largest element.

    Args:
        input: floating point, any shape.
        mapping_type: see `MappingType`.
        block_size: length of a block in each dimension of `input`; must divide the shape.
        quant_min: smallest code.
        quant_max: largest code.
        eps: smallest scale (a block of zeros would have scale 0); None: the smallest normal number of `input`'s dtype.
        scale_dtype: None: `input`'s.
        zero_point_dtype: None: int32 for INT, `input`'s dtype for FLOAT.
        zero_point_domain: FLOAT needs an asymmetric mapping and `preserve_zero=False`, NONE a symmetric mapping.
        preserve_zero: widen the range to contain 0, so that 0.0 is a grid point. A symmetric mapping always does.

    Returns:
        Scale and zero point, one entry a block; the zero point is None for NONE.

    Raises:
        UsageError: for a combination that has no meaning, or a dtype that is not floating point.
        ShapeError: when the blocks do not tile the shape.
    """
    _check_float(input)
    _check_combination(mapping_type, zero_point_domain, preserve_zero=preserve_zero)
    if quant_min >= quant_max:
        raise UsageError(f"quant_min must be smaller than quant_max, got {quant_min} and {quant_max}.")
    blocks, dims = _split(tuple(input.shape), block_size)
    if input.numel() == 0:
        raise ShapeError(f"an empty tensor {list(input.shape)} has no range to choose a scale from.")
    x = input.reshape(blocks)
    lowest, highest = torch.amin(x, dim=dims), torch.amax(x, dim=dims)
    if preserve_zero or mapping_type is not MappingType.ASYMMETRIC:
        lowest = torch.minimum(lowest, torch.zeros_like(lowest))
        highest = torch.maximum(highest, torch.zeros_like(highest))

    if mapping_type is MappingType.SYMMETRIC:
        scale = torch.maximum(-lowest, highest) / (float(quant_max - quant_min) / 2)
    elif mapping_type is MappingType.SYMMETRIC_NO_CLIPPING_ERR:
        if quant_min >= 0 or quant_max <= 0:
            raise UsageError(f"SYMMETRIC_NO_CLIPPING_ERR needs quant_min < 0 < quant_max, got {quant_min} and {quant_max}.")
        from_lowest, from_highest = lowest / float(quant_min), highest / float(quant_max)
        scale = torch.where(from_lowest > from_highest, from_lowest, from_highest)
    else:
        scale = (highest - lowest) / float(quant_max - quant_min)
    scale = torch.clamp(scale, min=torch.finfo(input.dtype).smallest_normal if eps is None else eps)

    mid = (quant_max + quant_min + 1) / 2
    zero_point: Tensor | None
    if zero_point_domain is ZeroPointDomain.NONE:
        zero_point = None
    elif zero_point_domain is ZeroPointDomain.FLOAT:
        zero_point = (lowest + scale * mid).to(zero_point_dtype or input.dtype)
    elif mapping_type is MappingType.ASYMMETRIC:
        zero_point = torch.clamp(quant_min - torch.round(lowest / scale), quant_min, quant_max).to(
            zero_point_dtype or torch.int32
        )
    else:
        zero_point = torch.full_like(scale, int(mid)).to(zero_point_dtype or torch.int32)
    return scale.to(scale_dtype or input.dtype), zero_point


def quantize_affine(  # noqa: PLR0913 - as above
    input: Tensor,  # noqa: A002
    block_size: tuple[int, ...],
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    output_dtype: torch.dtype,
    quant_min: int,
    quant_max: int,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
) -> Tensor:
    """Round every element to the nearest code of its block's grid.

    Args:
        input: floating point, any shape.
        block_size: see the module.
        scale: one entry a block.
        zero_point: one entry a block; None exactly when the domain is NONE.
        output_dtype: dtype of the codes: an integer that holds them, or a float to go on computing with.
        quant_min: smallest code.
        quant_max: largest code.
        zero_point_domain: see the module.

    Returns:
        Codes of `input`'s shape.

    Raises:
        UsageError: for a zero point that does not belong to the domain, or a dtype that cannot hold the codes.
        ShapeError: when the blocks do not tile the shape, or scale or zero point have not one entry a block.
    """
    _check_float(input)
    _check_holds(output_dtype, quant_min, quant_max)
    shape = tuple(input.shape)
    blocks, _ = _split(shape, block_size)
    s, z = _spread(scale, zero_point, shape, block_size, zero_point_domain)
    x = input.reshape(blocks)
    if zero_point_domain is ZeroPointDomain.FLOAT and z is not None:
        lowest = z - s * ((quant_max + quant_min + 1) / 2)
        codes = torch.round((x - lowest) / torch.where(s == 0, torch.inf, s))
    else:
        inverse = 1.0 / s
        codes = torch.round(x * torch.where(inverse.isinf(), 0.0, inverse))
        if z is not None:
            codes = codes + z
    return torch.clamp(codes, quant_min, quant_max).reshape(shape).to(output_dtype)


def dequantize_affine(  # noqa: PLR0913 - as above
    input: Tensor,  # noqa: A002
    block_size: tuple[int, ...],
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    quant_min: int,
    quant_max: int,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the real numbers that codes mean.

    Args:
        input: codes, any shape.
        block_size: see the module.
        scale: one entry a block.
        zero_point: one entry a block; None exactly when the domain is NONE.
        quant_min: smallest code.
        quant_max: largest code.
        zero_point_domain: see the module.
        output_dtype: dtype of the result; intermediate results are rounded to it too, as torchao does.

    Returns:
        Numbers of `input`'s shape.

    Raises:
        UsageError: for a zero point that does not belong to the domain, or an output that is not floating point.
        ShapeError: when the blocks do not tile the shape, or scale or zero point have not one entry a block.
    """
    if output_dtype not in _FLOATS:
        raise UsageError(f"dequantized numbers are float32, bfloat16, float16 or float64, got {output_dtype}.")
    shape = tuple(input.shape)
    blocks, _ = _split(shape, block_size)
    s, z = _spread(scale, zero_point, shape, block_size, zero_point_domain)
    codes = input.reshape(blocks)
    if zero_point_domain is ZeroPointDomain.FLOAT and z is not None:
        centred = (codes.to(torch.float32) - (quant_max + quant_min + 1) / 2).to(output_dtype)
        numbers = (centred * s).to(output_dtype) + z
    else:
        numbers = codes.to(output_dtype)
        if z is not None:
            numbers = numbers - z.to(output_dtype)
        numbers = numbers * s
    return numbers.reshape(shape).to(output_dtype)


def _split(shape: tuple[int, ...], block_size: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Return the shape with every dimension d split into (d / b, b), and the positions of the b's."""
    if len(shape) != len(block_size) or any(b < 1 or d % b for d, b in zip(shape, block_size, strict=True)):
        raise ShapeError(
            f"blocks of {list(block_size)} do not tile a tensor of shape {list(shape)}; each must divide its dimension."
        )
    blocks = [length for d, b in zip(shape, block_size, strict=True) for length in (d // b, b)]
    return blocks, list(range(1, len(blocks), 2))


def _spread(
    scale: Tensor, zero_point: Tensor | None, shape: tuple[int, ...], block_size: tuple[int, ...], domain: ZeroPointDomain
) -> tuple[Tensor, Tensor | None]:
    """Check scale and zero point against the blocks, and return them shaped to broadcast over the split tensor."""
    if (zero_point is None) != (domain is ZeroPointDomain.NONE):
        got = "none" if zero_point is None else "one"
        raise UsageError(
            f"a {domain.name} grid {'has no' if domain is ZeroPointDomain.NONE else 'needs a'} zero point, got {got}."
        )
    entries = [d // b for d, b in zip(shape, block_size, strict=True)]
    for name, tensor in (("scale", scale), ("zero point", zero_point)):
        if tensor is not None and list(tensor.shape) != entries:
            raise ShapeError(
                f"the {name} of blocks {list(block_size)} of {list(shape)} has shape {entries}, got {list(tensor.shape)}."
            )
    spread = [length for count in entries for length in (count, 1)]
    return scale.reshape(spread), None if zero_point is None else zero_point.reshape(spread)


def _check_float(tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise UsageError(f"only float32, bfloat16, float16 and float64 can be quantized, got {tensor.dtype}.")


def _check_holds(dtype: torch.dtype, quant_min: int, quant_max: int) -> None:
    if dtype.is_floating_point:
        largest = round(2 / torch.finfo(dtype).eps)  # integers up to 2 / eps are all there
        if max(abs(quant_min), abs(quant_max)) <= largest:
            return
    elif torch.iinfo(dtype).min <= quant_min and quant_max <= torch.iinfo(dtype).max:
        return
    raise UsageError(f"{dtype} cannot hold every code from {quant_min} to {quant_max}; choose a wider output_dtype.")


def _check_combination(mapping_type: MappingType, domain: ZeroPointDomain, *, preserve_zero: bool) -> None:
    asymmetric = mapping_type is MappingType.ASYMMETRIC
    if domain is ZeroPointDomain.FLOAT and (not asymmetric or preserve_zero):
        raise UsageError(
            "a FLOAT zero point is the real number at the middle of the grid: it needs MappingType.ASYMMETRIC and "
            f"preserve_zero=False, got {mapping_type.name} and preserve_zero={preserve_zero}."
        )
    if domain is ZeroPointDomain.NONE and asymmetric:
        raise UsageError("an ASYMMETRIC mapping needs a zero point; use ZeroPointDomain.INT or FLOAT, got NONE.")
    if not asymmetric and not preserve_zero:
        raise UsageError(f"a {mapping_type.name} mapping always represents zero; preserve_zero=False needs ASYMMETRIC.")
