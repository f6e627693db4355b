"""How numbers are written: as many digits as are known, and no more."""

from __future__ import annotations

from math import floor, isfinite, log10

from llmq.errors import UsageError

ABSENT = "–"
"""What stands where nothing was measured."""

_SIGNIFICANT = 4
"""Digits of a number whose error is not known."""

_SMALLEST_FIXED = 1e-4
"""Numbers below are written with an exponent."""


def with_error(value: float, stderr: float | None, *, factor: float = 1.0, unit: str = "") -> str:
    """Write `value` ± `stderr`, both times `factor`, such as '5.4712 ± 0.0031' or '(2.10 ± 0.03)e-5'.

    The error gets two significant digits when it starts with 1 or 2 and one otherwise (the Particle Data Group's habit,
    simplified), and the value as many decimals as its error. Without an error the value gets four significant digits.

    Raises:
        UsageError: a number is not finite, or the error is negative.
    """
    body, error, exponent = _rounded(value, stderr, factor)
    if error is None:
        return body + unit
    return f"({body} ± {error})e{exponent}{unit}" if exponent else f"{body} ± {error}{unit}"


def apart(value: float, stderr: float | None, *, factor: float = 1.0) -> tuple[str, str]:
    """Write what `with_error` writes as two texts, such as '2.10e-5' and '0.03e-5'; the error is `ABSENT` where there is none."""
    body, error, exponent = _rounded(value, stderr, factor)
    power = f"e{exponent}" if exponent else ""
    return body + power, ABSENT if error is None else error + power


def _rounded(value: float, stderr: float | None, factor: float) -> tuple[str, str | None, int]:
    """Return value and error times `factor`, as they are written, and the power of ten that both are written in."""
    if not isfinite(value) or (stderr is not None and not (isfinite(stderr) and stderr >= 0)):
        raise UsageError(f"a figure needs a finite value and an error that is not negative, got {value} ± {stderr}.")
    value, error = value * factor, None if stderr is None else stderr * factor
    if error is None:
        return plain(value), None, 0
    if error == 0:
        return plain(value), "0", 0
    exponent = 0
    largest = max(abs(value), error)
    if largest < _SMALLEST_FIXED:
        exponent = floor(log10(largest))
        value, error = value / 10.0**exponent, error / 10.0**exponent
    decimals = _decimals_of_error(error)
    if decimals < 0:  # the error is in the tens or more: what is below it is noise
        scale = 10.0**-decimals
        value, error, decimals = round(value / scale) * scale, round(error / scale) * scale, 0
    return f"{value + 0.0:.{decimals}f}", f"{error:.{decimals}f}", exponent


def plain(value: float, significant: int = _SIGNIFICANT) -> str:
    """Write `value` with `significant` digits: '5.471', '0.01200', '2.1e-07'; digits before the point are all kept."""
    if value == 0:
        return "0"
    if not isfinite(value):
        raise UsageError(f"a figure needs a finite value, got {value}.")
    if abs(value) < _SMALLEST_FIXED:
        return f"{value:.{max(0, significant - 3)}e}"
    rounded = float(f"{value:.{significant - 1}e}")  # 0.99996 has four digits as 1.000, not as 1.0000
    magnitude = floor(log10(abs(rounded)))
    return f"{value:.{max(0, significant - 1 - magnitude)}f}"


def size(nbytes: float) -> str:
    """Write a number of bytes in decimal units (GB = 10⁹ bytes), three digits: '2.20 GB', '968 kB'."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= 0.9995 * factor:
            return f"{plain(nbytes / factor, 3)} {unit}"
    return f"{nbytes:.0f} B"


def _decimals_of_error(error: float) -> int:
    """Return how many decimals show one digit of `error`, or two when it starts with 1 or 2; negative above ten."""
    magnitude = floor(log10(error))
    leading = int(error / 10.0**magnitude + 1e-9)
    return -magnitude + (1 if leading <= 2 else 0)
