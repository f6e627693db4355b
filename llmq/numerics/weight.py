"""QuantizedWeight: one linear layer's weight on a grid, in the canonical packing. Plain data; nothing here multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.errors import ShapeError, UsageError
from llmq.numerics.affine import ZeroPointDomain, dequantize_affine
from llmq.numerics.float8 import DTYPE as FLOAT8
from llmq.numerics.float8 import float8_numbers
from llmq.numerics.grid import Activation, CodeGrid, Float8Grid, FloatGrid, Grid, IntGrid
from llmq.numerics.packing import pack_codes, unpack_codes


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [N, K] on a grid.

    Attributes:
        grid: what the codes mean.
        shape: (N, K) = (out_features, in_features).
        qdata: the codes in the canonical packing (`numerics.packing`); on a Float8Grid float8_e4m3fn [N, K]; on a FloatGrid the
            weight itself, [N, K] of its dtype.
        scale: [N, groups] of the grid's scale dtype; None for a FloatGrid.
        zero_point: [N, groups]: uint8 codes ("int"), or numbers of the scale dtype ("float"); None for a grid without one.
        input_scale: fp32 [1], the scale of the linear's int8 input where the format has static activations, else None. It is no
            part of what the codes mean; it is here because it is stored, moved and laid out with them.
    """

    grid: Grid
    shape: tuple[int, int]
    qdata: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.shape
        self.grid.check(n, k)
        if isinstance(self.grid, FloatGrid):
            _expect("weight", self.qdata, (n, k), torch_dtype(self.grid.dtype))
            if self.scale is not None or self.zero_point is not None or self.input_scale is not None:
                raise UsageError("a weight on a float grid has neither scale nor zero point, nor an input scale.")
            return
        grid = self.grid
        _expect("qdata", self.qdata, *_stored_codes(grid, n, k))
        entries, scale_dtype = (n, grid.groups(k)), torch_dtype(grid.scale_dtype)
        if self.scale is None:
            raise UsageError(f"a weight on {'a float8' if isinstance(grid, Float8Grid) else 'an integer'} grid needs a scale.")
        _expect("scale", self.scale, entries, scale_dtype)
        if isinstance(grid, Float8Grid):
            if self.zero_point is not None or self.input_scale is not None:
                raise UsageError("a weight on a float8 grid has neither a zero point nor an input scale.")
            return
        if self.input_scale is not None:
            _expect("input scale", self.input_scale, (1,), torch.float32)
        if (self.zero_point is None) != (grid.zero_point == "none"):
            raise UsageError(
                f"a grid with zero_point={grid.zero_point!r} {'has no' if grid.zero_point == 'none' else 'needs a'} zero point."
            )
        if self.zero_point is not None:
            _expect("zero point", self.zero_point, entries, torch.uint8 if grid.zero_point == "int" else scale_dtype)

    @classmethod
    def from_codes(cls, grid: CodeGrid, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> QuantizedWeight:
        """Pack codes.

        Args:
            grid: an integer or a float8 grid.
            codes: [N, K], int8 for a symmetric grid, uint8 for an asymmetric one, float8_e4m3fn for a float8 grid.
            scale: [N, groups] of the grid's scale dtype.
            zero_point: see the class.

        Returns:
            The weight; scale and zero point are kept, not copied.

        Raises:
            ShapeError: when shapes do not belong together.
            UsageError: when dtypes do not, or a code lies outside the grid.
        """
        qdata = codes if isinstance(grid, Float8Grid) else pack_codes(codes, grid.bits, signed=grid.symmetric)
        return cls(grid, (codes.shape[0], codes.shape[1]), qdata, scale, zero_point)

    @classmethod
    def empty(cls, grid: CodeGrid, n: int, k: int) -> QuantizedWeight:
        """Make room for a weight [n, k] that comes from elsewhere; what its tensors hold is not defined."""
        shape, dtype = _stored_codes(grid, n, k)
        entries, scale_dtype = (n, grid.groups(k)), torch_dtype(grid.scale_dtype)
        zero_point = None
        if isinstance(grid, IntGrid) and grid.zero_point != "none":
            zero_point = torch.empty(entries, dtype=torch.uint8 if grid.zero_point == "int" else scale_dtype)
        return cls(grid, (n, k), torch.empty(shape, dtype=dtype), torch.empty(entries, dtype=scale_dtype), zero_point)

    @classmethod
    def from_float(cls, weight: Tensor) -> QuantizedWeight:
        """Wrap an unquantized weight [N, K] of float32, bfloat16 or float16; its memory is shared."""
        if weight.dim() != 2:
            raise ShapeError(f"a weight is a matrix [N, K], got shape {list(weight.shape)}.")
        return cls(float_grid(weight.dtype), (weight.shape[0], weight.shape[1]), weight)

    def codes(self) -> Tensor:
        """Return the codes [N, K], int8 for a symmetric grid, uint8 for an asymmetric one, float8_e4m3fn for a float8 grid.

        Raises:
            UsageError: on a float grid, which has no codes.
        """
        if isinstance(self.grid, FloatGrid):
            raise UsageError("a weight on a float grid has no codes; use dequantize().")
        if isinstance(self.grid, Float8Grid):
            return self.qdata
        return unpack_codes(self.qdata, self.grid.bits, self.shape[1], signed=self.grid.symmetric)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the numbers the codes mean, [N, K]: computed in fp32 (fp64 for `dtype` float64), rounded once to `dtype`."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        if isinstance(self.grid, FloatGrid):
            return self.qdata.to(dtype)
        assert self.scale is not None  # __post_init__
        if isinstance(self.grid, Float8Grid):
            return (float8_numbers(self.qdata).to(compute) * self.scale.to(compute)).to(dtype)
        numbers = dequantize_affine(
            self.codes(),
            (1, self.grid.group_size or self.shape[1]),
            self.scale.to(compute),
            None if self.zero_point is None else self.zero_point.to(compute),
            quant_min=self.grid.qmin,
            quant_max=self.grid.qmax,
            zero_point_domain=ZeroPointDomain(self.grid.zero_point),
            output_dtype=compute,
        )
        return numbers.to(dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything stored: qdata, then scale, zero point and input scale where there are some."""
        parts = (self.qdata, self.scale, self.zero_point, self.input_scale)
        return tuple(tensor for tensor in parts if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits over the number of elements."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Return output rows `start` to `stop` as a weight that shares memory with this one."""
        scale = None if self.scale is None else self.scale[start:stop]
        zero_point = None if self.zero_point is None else self.zero_point[start:stop]
        shape = (stop - start, self.shape[1])
        return QuantizedWeight(self.grid, shape, self.qdata[start:stop], scale, zero_point, self.input_scale)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Return the weight on `device`."""
        scale = None if self.scale is None else self.scale.to(device)
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        input_scale = None if self.input_scale is None else self.input_scale.to(device)
        return QuantizedWeight(self.grid, self.shape, self.qdata.to(device), scale, zero_point, input_scale)


def check_input_scale(activation: Activation | None, input_scale: Tensor | None) -> None:
    """Raise UsageError unless the scale of a linear's input is there exactly where its activations are static."""
    static = activation is not None and activation.static
    if static and input_scale is None:
        raise UsageError("static activations need the input_scale of their linear, got none; calibrate it, or use dynamic ones.")
    if input_scale is not None and not static:
        raise UsageError("only static activations have an input_scale, got one for a format without them; leave it out.")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits (of float8 ones torch.equal does not know)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    pair = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*pair)


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a grid's dtype name: 'float32', 'bfloat16' or 'float16'."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def float_grid(dtype: torch.dtype) -> FloatGrid:
    """Return the grid of an unquantized weight of `dtype`.

    Raises:
        UsageError: for a dtype other than float32, bfloat16 and float16.
    """
    if dtype == torch.float32:
        return FloatGrid("float32")
    if dtype == torch.bfloat16:
        return FloatGrid("bfloat16")
    if dtype == torch.float16:
        return FloatGrid("float16")
    raise UsageError(f"an unquantized weight is float32, bfloat16 or float16, got {dtype}.")


def _stored_codes(grid: CodeGrid, n: int, k: int) -> tuple[tuple[int, int], torch.dtype]:
    """Return shape and dtype of the codes of a weight [n, k] as they are stored."""
    if isinstance(grid, Float8Grid):
        return (n, k), FLOAT8
    row = k if grid.bits == 8 else -(-k * grid.bits // 8)
    return (n, row), torch.int8 if grid.bits == 8 and grid.symmetric else torch.uint8


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}.")
    if tensor.dtype != dtype:
        raise UsageError(f"{name} must be {dtype}, got {tensor.dtype}.")
