"""Grids: which numbers a stored code can mean. Plain values, comparable, hashable, JSON-able."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from llmq.errors import ShapeError, UsageError

GROUP_SIZES = (32, 64, 128, 256)
"""Group sizes offered when a shape does not fit (every int4 kernel of the field takes these)."""

ScaleDtype = Literal["float32", "bfloat16", "float16"]
ZeroPointDomain = Literal["none", "int", "float"]
_DTYPE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
_INPUT_SCALE_BYTES = 4

FLOAT8_LARGEST = 448.0
"""Largest e4m3 number: 1.75 * 2**8."""


@dataclass(frozen=True, slots=True)
class IntGrid:
    """An integer grid with one scale (and zero point) a group of `group_size` consecutive inputs of one output row.

    A code `q` of a group with scale `s` and zero point `z` means, computed in fp32:

    * symmetric (`zero_point="none"`): `q * s`, `q` in [-2**(bits-1), 2**(bits-1) - 1];
    * asymmetric, `zero_point="int"`: `(q - z) * s`, `q` and `z` in [0, 2**bits - 1];
    * asymmetric, `zero_point="float"` (tinygemm): `(q - 2**(bits-1)) * s + z`, `z` of `scale_dtype`.

    `group_size=None` is one group a row (per output channel).
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    zero_point: ZeroPointDomain = "none"
    scale_dtype: ScaleDtype = "float32"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits must be from 2 to 8, got {self.bits}.")
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(f"group_size must be positive or None (one group a row), got {self.group_size}.")
        if self.symmetric != (self.zero_point == "none"):
            raise UsageError("a symmetric grid has zero_point='none', an asymmetric one 'int' or 'float'.")

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def mid(self) -> int:
        """The code of the middle of an unsigned range, `2**(bits-1)`: tinygemm's offset, and packing's bias."""
        return 1 << (self.bits - 1)

    def groups(self, k: int) -> int:
        """Number of groups in a row of `k` inputs; `check` the shape first."""
        return 1 if self.group_size is None else k // self.group_size

    def bits_per_weight(self, k: int) -> float:
        """All stored bits of a row of `k` inputs, scales and zero points included, over `k`."""
        extra = _DTYPE_BITS[self.scale_dtype]
        if self.zero_point == "int":
            extra += 8  # stored one a byte
        elif self.zero_point == "float":
            extra += _DTYPE_BITS[self.scale_dtype]
        packed_row_bits = -(-k * self.bits // 8) * 8
        return (packed_row_bits + self.groups(k) * extra) / k

    def misfit(self, n: int, k: int) -> str | None:
        """Return why a weight [n, k] does not fit, naming group sizes that would, or None when it fits."""
        if self.group_size is None or k % self.group_size == 0:
            return None
        fits = [str(size) for size in GROUP_SIZES if k % size == 0]
        advice = f"group sizes that fit: {', '.join(fits)}" if fits else f"none of {', '.join(map(str, GROUP_SIZES))} fits"
        return f"{k} inputs cannot be cut into groups of {self.group_size} ({advice})"

    def check(self, n: int, k: int, fqn: str = "weight") -> None:
        """Raise ShapeError when a weight [n, k] does not fit."""
        reason = self.misfit(n, k)
        if reason:
            raise ShapeError(f"{fqn} [{n}, {k}] does not fit: {reason}.")

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest; `grid_from_json` reads it."""
        return {"kind": "int", **asdict(self)}


@dataclass(frozen=True, slots=True)
class Float8Grid:
    """Float8 numbers (e4m3: `torch.float8_e4m3fn`) with one scale a row: a code `q` means `q * s`, computed in fp32.

    A code has a sign, four bits of exponent and three of mantissa: 0, the multiples of 2**-9 up to 2**-6 (subnormal), and from
    there eight numbers an octave up to `FLOAT8_LARGEST`. There is no infinity; the one pattern that is NaN stands in no weight.
    """

    scale_dtype: ScaleDtype = "float32"
    group_size: ClassVar[None] = None
    """As of an `IntGrid` with one group a row."""

    def groups(self, k: int) -> int:
        """Number of groups in a row: one."""
        return 1

    def bits_per_weight(self, k: int) -> float:
        """All stored bits of a row of `k` inputs, the scale included, over `k`."""
        return 8 + _DTYPE_BITS[self.scale_dtype] / k

    def misfit(self, n: int, k: int) -> str | None:
        """Every shape fits."""
        return None

    def check(self, n: int, k: int, fqn: str = "weight") -> None:
        """Every shape fits."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest; `grid_from_json` reads it."""
        return {"kind": "float8", **asdict(self)}


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """The numbers a floating dtype can hold: the grid of an unquantized weight. There is no scale and no zero point."""

    dtype: ScaleDtype

    def bits_per_weight(self, k: int) -> float:
        """Bits of one element."""
        return float(_DTYPE_BITS[self.dtype])

    def misfit(self, n: int, k: int) -> str | None:
        """Every shape fits."""
        return None

    def check(self, n: int, k: int, fqn: str = "weight") -> None:
        """Every shape fits."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest; `grid_from_json` reads it."""
        return {"kind": "float", **asdict(self)}


CodeGrid = IntGrid | Float8Grid
"""The grids of quantized weights: codes and scales."""

Grid = CodeGrid | FloatGrid


def grid_from_json(data: dict[str, Any]) -> Grid:
    """Inverse of `to_json`; raises KeyError or UsageError where `data` is none of a grid's."""
    fields = {key: value for key, value in data.items() if key != "kind"}
    if data["kind"] == "int":
        return IntGrid(**fields)
    if data["kind"] == "float8":
        return Float8Grid(**fields)
    if data["kind"] == "float":
        return FloatGrid(**fields)
    raise UsageError(f"a grid is of kind int, float8 or float, got {data['kind']!r}; this llmq may be too old for it.")


@dataclass(frozen=True, slots=True)
class ActivationGrid:
    """Int8 quantization of the activations, in fp32.

    Dynamic: one scale (and integer zero point) a token, found when the linear is called. symmetric: codes [-127, 127],
    scale = max(absmax / 127, eps); asymmetric: codes [-128, 127], zero point int.

    Static: one scale a linear, found by calibration and stored with its weight (`QuantizedWeight.input_scale`); symmetric, and
    what lies beyond 127 scales is clamped. `eps` is not used.
    """

    symmetric: bool = True
    eps: float = 1e-5
    static: bool = False

    def __post_init__(self) -> None:
        if self.static and not self.symmetric:
            raise UsageError("static activations have one scale and no zero point; use symmetric=True, got symmetric=False.")


@dataclass(frozen=True, slots=True)
class Float8Activation:
    """Float8 (e4m3) quantization of the activations, in fp32, when the linear is called.

    Codes are the e4m3 numbers nearest to x / scale, scale = max(absmax / 448, eps): of a token ("row"), or of all of them
    together ("tensor"), where what a token gives depends on those beside it.
    """

    granularity: Literal["row", "tensor"] = "row"
    eps: float = 1e-12
    symmetric: ClassVar[bool] = True
    """As of an `ActivationGrid`: there is no zero point …"""
    static: ClassVar[bool] = False
    """… and no scale that calibration finds."""

    def __post_init__(self) -> None:
        if self.granularity not in ("row", "tensor"):
            raise UsageError(f"float8 activations have one scale a 'row' or a 'tensor', got {self.granularity!r}.")


Activation = ActivationGrid | Float8Activation


@dataclass(frozen=True, slots=True)
class LinearFormat:
    """What one quantized linear computes: the grid of its weight, and that of its input (None: not quantized)."""

    weight: Grid
    activation: Activation | None = None

    def __post_init__(self) -> None:
        if self.has_input_scale and isinstance(self.weight, FloatGrid):
            raise UsageError(f"static int8 activations need a weight of integer codes, got {self.weight}.")
        float8 = isinstance(self.weight, Float8Grid), isinstance(self.activation, Float8Activation)
        if self.activation is not None and any(float8) and not all(float8):
            raise UsageError(
                f"float8 weights and float8 activations only go with each other, got {self.weight} with {self.activation}."
            )

    @property
    def quantized(self) -> bool:
        """Whether the weight is: it has codes and scales."""
        return not isinstance(self.weight, FloatGrid)

    @property
    def has_input_scale(self) -> bool:
        """Whether the scale of the input is stored with the weight."""
        return self.activation is not None and self.activation.static

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of a weight [n, k] as it is stored, scales and zero points included; ShapeError when it does not fit."""
        self.weight.check(n, k)
        return n * round(self.weight.bits_per_weight(k) * k) // 8 + (_INPUT_SCALE_BYTES if self.has_input_scale else 0)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest; `format_from_json` reads it."""
        return {"weight": self.weight.to_json(), "activation": _activation_to_json(self.activation)}


def format_from_json(data: dict[str, Any]) -> LinearFormat:
    """Inverse of `LinearFormat.to_json`."""
    return LinearFormat(grid_from_json(data["weight"]), _activation_from_json(data["activation"]))


def _activation_to_json(activation: Activation | None) -> dict[str, Any] | None:
    """Int8 activations carry no kind: they were the only ones in the first manifests."""
    if activation is None:
        return None
    fields = asdict(activation)
    return {"kind": "float8", **fields} if isinstance(activation, Float8Activation) else fields


def _activation_from_json(data: dict[str, Any] | None) -> Activation | None:
    if not data:
        return None
    fields = {key: value for key, value in data.items() if key != "kind"}
    return Float8Activation(**fields) if data.get("kind") == "float8" else ActivationGrid(**fields)
