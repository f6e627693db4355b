"""Float8 codes: the only place where a number is rounded to e4m3, and the way back.

A code is a `torch.float8_e4m3fn`: 1 sign, 4 exponent and 3 mantissa bits, `2**(e - 7) * (1 + m / 8)`, for e = 0 `2**-6 * m / 8`.
448 is the largest, and of the patterns only 0x7f and 0xff mean no number. With `s` the scale of a row or of a tensor

    q = e4m3(clamp(x / s, -448, 448))       s = max(absmax / 448, eps)

computed in fp32, the quotient rounded to nearest, ties to even. That is the arithmetic of torchao's float8, against which the
tests compare every bit. Clamping first makes the cast saturate whatever torch's own does: some versions give NaN beyond 464.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.numerics.grid import FLOAT8_LARGEST

DTYPE = torch.float8_e4m3fn
NAN_CODE = 0x7F
"""The pattern, without its sign, that is no number."""

_FP16_BITS = -(1 << 14) - 1
"""All of an int16's bits but the one below the sign."""


def float8_scale(absmax: Tensor, eps: float) -> Tensor:
    """Return the scale, fp32, that puts `absmax` on the largest code; never below `eps`, and not finite where `absmax` is not."""
    return torch.clamp(absmax.float() / FLOAT8_LARGEST, min=eps)


def round_to_float8(x: Tensor, scale: Tensor) -> Tensor:
    """Return the codes nearest to `x / scale`, saturating; a NaN stays one.

    Args:
        x: floating point.
        scale: fp32, of a shape that `x` can be divided by. With a scale of 0 all codes mean 0, and 0 is taken.
    """
    quotient = x.float() / torch.where(scale == 0, torch.inf, scale)
    return torch.clamp(quotient, -FLOAT8_LARGEST, FLOAT8_LARGEST).to(DTYPE)


def float8_numbers(codes: Tensor) -> Tensor:
    """Return what codes are without their scale, fp32 of the same shape; exact.

    On a CPU torch casts one code at a time, but in compiled graphs. Shifted by seven, a code's bits are those of an fp16 number
    2**8 times too small, subnormals included, and that takes vector instructions, a tenth of the time.
    """
    if codes.device.type != "cpu" or torch.compiler.is_compiling():
        return codes.float()
    bits = codes.view(torch.int8).to(torch.int16)
    bits <<= 7
    bits &= _FP16_BITS
    numbers = bits.view(torch.float16).float()
    numbers *= 2.0**8
    if has_nan(codes):
        numbers.masked_fill_(numbers.abs() > FLOAT8_LARGEST, torch.nan)
    return numbers


def has_nan(codes: Tensor) -> bool:
    """Whether one of the codes is no number."""
    return bool(codes.numel()) and int((codes.view(torch.uint8) & NAN_CODE).max()) == NAN_CODE
