"""The meaning of a quantized linear, in plain torch: what every other kernel is tested against. It always qualifies."""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.errors import KernelError
from llmq.numerics.affine import MappingType, ZeroPointDomain, choose_qparams_affine, quantize_affine
from llmq.numerics.float8 import float8_numbers, float8_scale, round_to_float8
from llmq.numerics.grid import Activation, ActivationGrid, Float8Activation, Float8Grid, IntGrid
from llmq.numerics.weight import QuantizedWeight, check_input_scale
from llmq.ops.schema import SUPPORTED, CanonicalLayout, Case, Support, unsupported

FP32_EXACT = 1 << 24
"""fp32 holds every integer up to here, so an fp32 sum of integers that stays below is exact in any order."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Reference(CanonicalLayout):
    """Dequantize and multiply in fp32; int8 activations: exact integer sums group by group; float8 ones: fp32 sums of codes."""

    name = "reference"
    formats = "every format; bf16, fp16, fp32"
    min_rows = 1
    max_rows: int | None = None

    def available(self) -> Support:
        """See `Kernel.available`."""
        return SUPPORTED

    def supports(self, case: Case) -> Support:
        """See `Kernel.supports`."""
        return computable(case)

    def linear(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None, case: Case) -> Tensor:
        """See `Kernel.linear`."""
        weight = self.unpack(tensors, case)
        if case.format.activation is None:
            y = x.float() @ weight.dequantize().T
        else:
            codes, scale = quantize_activation(x, case.format.activation, weight.input_scale)
            if isinstance(case.format.activation, Float8Activation):
                y = float8_product(codes, weight) * scale
            else:
                y = grouped_integer_product(codes, weight, case.format.activation) * scale
        return finish(y, bias, case.dtype)


def computable(case: Case) -> Support:
    """Whether the format has a meaning for these dtypes: what every kernel asks first."""
    if case.dtype not in _DTYPES:
        return unsupported(f"activations are {case.dtype}; float32, bfloat16 and float16 are known")
    grid, activation = case.format.weight, case.format.activation
    misfit = grid.misfit(case.n, case.k)
    if misfit:
        return unsupported(misfit)
    if activation is None or isinstance(grid, Float8Grid):
        return SUPPORTED
    if not isinstance(grid, IntGrid) or isinstance(activation, Float8Activation) or grid.zero_point == "float":
        return unsupported("int8 activations need a weight of integer codes with an integer zero point or none")
    largest = _largest_activation(activation) * _largest_code(grid)
    if largest * case.k >= 1 << 31:
        return unsupported(f"sums of {case.k} products of up to {largest} overflow int32")
    return SUPPORTED


def quantize_activation(x: Tensor, grid: Activation, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize the rows of x to int8 or float8, in fp32.

    Args:
        x: [M, K], floating point.
        grid: symmetric: codes [-127, 127], scale = max(absmax / 127, eps); asymmetric: codes [-128, 127] and a zero point;
            float8: see `Float8Activation`.
        input_scale: fp32 [1], the scale of all rows: exactly where the grid is static.

    Returns:
        codes minus zero point, fp32 [M, K] holding integers, or e4m3 numbers (a row with a NaN or an infinity holds NaN), and
        scale, fp32 [M, 1].

    Raises:
        UsageError: when there is no `input_scale` and the grid is static, or the other way round.
    """
    check_input_scale(grid, input_scale)
    x = x.float()
    block = (1, x.shape[1])
    if x.shape[0] == 0:
        return x, x.new_ones(0, 1)
    if isinstance(grid, Float8Activation):
        float8, scale = float8_codes(x, grid)
        return float8_numbers(float8), scale
    low = -127 if grid.symmetric else -128
    if input_scale is not None:
        scale = input_scale.reshape(1, 1).expand(x.shape[0], 1)
        codes = quantize_affine(
            x,
            block,
            scale,
            None,
            output_dtype=torch.float32,
            quant_min=low,
            quant_max=127,
            zero_point_domain=ZeroPointDomain.NONE,
        )
        return codes + x * 0, scale  # what is not finite would be clamped, and hidden
    mapping, domain = (
        (MappingType.SYMMETRIC, ZeroPointDomain.NONE) if grid.symmetric else (MappingType.ASYMMETRIC, ZeroPointDomain.INT)
    )
    scale, zero_point = choose_qparams_affine(
        x,
        mapping,
        block,
        quant_min=low,
        quant_max=127,
        eps=grid.eps,
        zero_point_dtype=torch.float32,  # an integer, kept where a NaN can pass
        zero_point_domain=domain,
    )
    codes = quantize_affine(
        x, block, scale, zero_point, output_dtype=torch.float32, quant_min=low, quant_max=127, zero_point_domain=domain
    )
    return (codes if zero_point is None else codes - zero_point), scale


def float8_codes(x: Tensor, grid: Float8Activation) -> tuple[Tensor, Tensor]:
    """Quantize the rows of x to float8, in fp32.

    Args:
        x: [M, K], floating point, M > 0.
        grid: what shares a scale.

    Returns:
        codes, float8_e4m3fn [M, K] (a row with a NaN or an infinity has NaN there), and scale, fp32 [M, 1].
    """
    x = x.float()
    absmax = x.abs().amax(dim=1, keepdim=True)
    if grid.granularity == "tensor":  # a row that is not finite breaks itself, and no other; its infinities would be clamped
        finite = absmax.isfinite()
        absmax = torch.where(finite, absmax, 0).amax(dim=0, keepdim=True).expand_as(absmax)
        x = torch.where(finite, x, torch.nan)
    scale = float8_scale(absmax, grid.eps)
    return round_to_float8(x, scale), scale


def float8_product(codes: Tensor, weight: QuantizedWeight) -> Tensor:
    """Return ws[n] * sum_k codes[m, k] * wq[n, k], fp32 [M, N], for e4m3 numbers [M, K] as `quantize_activation` returns them.

    A product of two has at most 8 significant bits and is exact in fp32; the sum is rounded as fp32 sums are.
    """
    assert weight.scale is not None
    return codes @ float8_numbers(weight.qdata).T * weight.scale.float().T


def grouped_integer_product(codes: Tensor, weight: QuantizedWeight, activation: ActivationGrid) -> Tensor:
    """Return sum_g ws[n, g] * float(sum_k codes[m, k] * (wq[n, k] - wz[n, g])), fp32 [M, N].

    The inner sums are exact: factors are integers of at most 8 bits and a sign, and an fp32 matrix product of a chunk of K so
    short that no partial sum reaches 2**24 has nothing to round. Without VNNI that is far faster than torch's integer product,
    which handles one element at a time. Longer groups are summed in chunks, in int32.

    Args:
        codes: [M, K], fp32 integers (activation codes minus zero point).
        weight: integer codes.
        activation: grid the codes came from.
    """
    grid = weight.grid
    assert isinstance(grid, IntGrid)  # computable()
    assert weight.scale is not None
    n, k = weight.shape
    group = grid.group_size or k
    wq = weight.codes().float().reshape(n, k // group, group)
    if weight.zero_point is not None:
        wq = wq - weight.zero_point.float().unsqueeze(2)
    ws = weight.scale.float()
    y = codes.new_zeros(codes.shape[0], n)
    for g in range(k // group):
        columns = codes[:, g * group : (g + 1) * group]
        y = y + exact_product(columns, wq[:, g], _largest_activation(activation) * _largest_code(grid)) * ws[:, g]
    return y


def exact_product(a: Tensor, b: Tensor, largest: int) -> Tensor:
    """Return a @ b^T for fp32 matrices of integers [M, K], [N, K] whose products are at most `largest`, each sum rounded once.

    A NaN in a row of `a` makes that row of the result NaN.
    """
    chunk = exact_chunk(largest)
    if a.shape[1] <= chunk:
        return a @ b.T
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    poison = a.new_zeros(a.shape[0], 1)
    for start in range(0, a.shape[1], chunk):
        part = a[:, start : start + chunk]
        total = total + (part @ b[:, start : start + chunk].T).to(torch.int32)
        poison = poison + (part * 0).sum(dim=1, keepdim=True)  # NaN where a code is NaN, else 0
    return total.float() + poison


def exact_chunk(largest: int) -> int:
    """Return the longest chunk of K over which fp32 sums of products up to `largest` are exact."""
    return (FP32_EXACT - 1) // largest


def finish(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Add the bias in fp32 and round once."""
    return (y if bias is None else y + bias.float()).to(dtype)


def largest_product(case: Case) -> int:
    """Return the largest product of an activation code and a weight code, zero points subtracted.

    Raises:
        KernelError: for a format without quantized activations.
    """
    if not isinstance(case.format.activation, ActivationGrid) or not isinstance(case.format.weight, IntGrid):
        raise KernelError(f"only formats with integer weights and activations have integer products, got {case.format}.")
    return _largest_activation(case.format.activation) * _largest_code(case.format.weight)


def _largest_activation(activation: ActivationGrid) -> int:
    return 127 if activation.symmetric else 255


def _largest_code(grid: IntGrid) -> int:
    return grid.mid if grid.symmetric else grid.qmax
