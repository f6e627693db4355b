"""The int8 kernels against their definition in torch, bit for bit, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmq.errors import KernelError
from llmq.numerics.grid import ActivationGrid, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.ops import native
from llmq.ops.cpu import NativeInt8Dynamic
from llmq.ops.schema import Case

pytestmark = pytest.mark.usefixtures("native_library")

EPS = 1e-5
ROWS = (0, 1, 2, 3, 7, 8, 16, 17, 64)
OUTPUTS = (1, 48, 50, 256)
INPUTS = (1, 31, 96, 352, 1111)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMAT = LinearFormat(IntGrid(8), ActivationGrid(symmetric=True, eps=EPS))


def instruction_sets() -> list[str]:
    status = native.status()
    return list(status.features) if isinstance(status, native.Available) else ["none"]


@pytest.fixture(params=instruction_sets())
def kernels(request) -> native.Int8Kernels:
    return native.int8_kernels(request.param)


def quantize_by_definition(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    scale = torch.clamp(x.abs().amax(dim=1, keepdim=True) / 127, min=EPS)
    return torch.clamp(torch.round(x * (1 / scale)), -127, 127), scale


def linear_by_definition(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    codes, scale = quantize_by_definition(x)
    y = (codes.double() @ w.double().T).float() * scale * w_scale  # every fp64 sum here is exact
    return (y if bias is None else y + bias.float()).to(x.dtype)


def make(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both signs and ends of every range, rows of very different size, rows of zeros, scales far from 1."""
    generator = torch.Generator().manual_seed(m * 7919 + n * 31 + k)
    x = torch.randn(m, k, generator=generator)
    if m > 2:
        x[1] = 0
        x[2] *= 100
    w = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
    w[0] = -128
    w[-1, ::2] = 127
    w_scale = 0.6 * torch.rand(n, generator=generator) * 2.0 ** torch.randint(-6, 3, (n,), generator=generator)
    return x.to(dtype), w, w_scale, torch.randn(n, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_the_definition(kernels, dtype):
    for n in OUTPUTS:
        for k in INPUTS:
            for m in ROWS if n == 50 or k == 96 else (1, 17):
                x, w, w_scale, bias = make(m, n, k, dtype)
                packed = kernels.pack(w)
                for offset in (None, bias):
                    y = kernels.linear(x, packed, w_scale, offset, EPS)
                    assert y.dtype == dtype
                    assert torch.equal(y, linear_by_definition(x, w, w_scale, offset)), (m, n, k)


def test_several_tiles_and_blocks(kernels):
    x, w, w_scale, bias = make(101, 300, 2500)
    assert torch.equal(kernels.linear(x, kernels.pack(w), w_scale, bias, EPS), linear_by_definition(x, w, w_scale, bias))


def test_more_rows_than_one_chunk(kernels):
    x, w, w_scale, bias = make(1030, 20, 40)
    assert torch.equal(kernels.linear(x, kernels.pack(w), w_scale, bias, EPS), linear_by_definition(x, w, w_scale, bias))


def test_extremes_do_not_saturate(kernels):
    """Pairs of products of one sign and the greatest size: what vpmaddubsw would clip."""
    for code, value in ((-128, 1.0), (-128, -1.0), (127, 1.0), (127, -1.0)):
        w = torch.full((17, 4096), code, dtype=torch.int8)
        x = torch.full((7, 4096), value)
        y = kernels.linear(x, kernels.pack(w), torch.ones(17), None, EPS)
        assert torch.equal(y, linear_by_definition(x, w, torch.ones(17), None))
        assert abs(y[0, 0].item() - 4096 * code * value) <= 1e-6 * 4096 * 128


def test_quantizes_by_the_definition(kernels):
    for dtype in DTYPES:
        for m, k in ((0, 3), (1, 1), (3, 31), (17, 1111), (64, 256)):
            x = make(m, 1, k, dtype)[0]
            codes, scale = kernels.quantize(x, EPS)
            expected_codes, expected_scale = quantize_by_definition(x) if m else (x, x.new_empty(0, 1))
            assert torch.equal(codes.float(), expected_codes.float())
            assert torch.equal(scale, expected_scale.float().reshape(-1))


def test_ties_round_to_even(kernels):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5]])
    codes, scale = kernels.quantize(x, EPS)
    assert scale.item() == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126]]


def test_tiny_rows_are_held_by_eps(kernels):
    codes, scale = kernels.quantize(torch.tensor([[1e-7, -1e-7], [0.0, 0.0], [EPS * 0.5, EPS]]), EPS)
    assert scale.tolist() == [torch.tensor(EPS).item()] * 3
    assert codes.tolist() == [[0, 0], [0, 0], [0, 1]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_nan_and_spoils_no_other(kernels, bad):
    x, w, w_scale, bias = make(7, 33, 70)
    clean = kernels.linear(x, kernels.pack(w), w_scale, bias, EPS)
    x[4, 69] = bad
    codes, scale = kernels.quantize(x, EPS)
    assert not codes[4].any()
    assert not torch.isfinite(scale[4])
    y = kernels.linear(x, kernels.pack(w), w_scale, bias, EPS)
    assert torch.isnan(y[4]).all()
    others = torch.arange(7) != 4
    assert torch.equal(y[others], clean[others])


def test_unpacks_bit_for_bit(kernels):
    for n in OUTPUTS:
        for k in INPUTS:
            w = make(1, n, k)[1]
            assert torch.equal(kernels.unpack(kernels.pack(w), n, k), w)
    assert torch.equal(kernels.unpack(kernels.pack(w.T), k, n), w.T)  # not contiguous


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_offsets(kernels, dtype):
    x, w, w_scale, bias = make(6, 20, 37, dtype)
    packed, expected = kernels.pack(w), linear_by_definition(x, w, w_scale, bias)
    wide = torch.full((6, 100), float("nan"), dtype=dtype)
    wide[:, 13:50] = x
    interleaved = torch.full((6, 74), float("nan"), dtype=dtype)
    interleaved[:, ::2] = x
    ways = {"rows apart": wide[:, 13:50], "columns apart": interleaved[:, ::2], "transposed": x.T.contiguous().T}
    for way, view in ways.items():
        assert not view.is_contiguous()
        assert torch.equal(kernels.linear(view, packed, w_scale, bias, EPS), expected), way
    shifted = torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].reshape(6, 37)
    assert torch.equal(kernels.linear(shifted, packed, w_scale, bias, EPS), expected)
    assert torch.equal(kernels.linear(x[2:3].expand(6, 37), packed, w_scale, bias, EPS), expected[2:3].expand(6, 20))
    assert torch.equal(kernels.linear(x, packed, torch.stack([w_scale, bias], 1)[:, 0], bias, EPS), expected)
    assert torch.equal(kernels.linear(x, packed, w_scale.reshape(20, 1), bias, EPS), expected)


def test_the_number_of_threads_changes_no_bit(kernels, threads):
    x, w, w_scale, bias = make(65, 500, 700)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append((kernels.pack(w), *kernels.quantize(x, EPS), kernels.linear(x, kernels.pack(w), w_scale, bias, EPS)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_does_not_depend_on_the_rows_beside_it(kernels):
    x, w, w_scale, bias = make(64, 100, 300)
    packed = kernels.pack(w)
    together = kernels.linear(x, packed, w_scale, bias, EPS)
    for row in range(0, 64, 9):
        assert torch.equal(kernels.linear(x[row : row + 1], packed, w_scale, bias, EPS), together[row : row + 1])


def test_refuses_what_does_not_belong_together(kernels):
    x, w, w_scale, bias = make(2, 20, 30)
    packed = kernels.pack(w)
    for arguments, message in (
        ((x.double(), packed, w_scale, bias, EPS), "take x .M, K. of float32"),
        ((x[0], packed, w_scale, bias, EPS), "take x .M, K. of float32"),
        ((x, packed[:-1], w_scale, bias, EPS), r"a weight \[20, 30\] packed for"),
        ((x, packed.view(torch.int8), w_scale, bias, EPS), "packed must be a 1-dimensional torch.uint8"),
        ((x, packed, w_scale.int(), bias, EPS), "scale must be 20 floats"),
        ((x, packed, w_scale, bias[:-1], EPS), "bias must be 20 floats"),
        ((x, packed, w_scale, bias, 0.0), "eps must be a positive, finite, normal float"),
    ):
        with pytest.raises(KernelError, match=message):
            kernels.linear(*arguments)
    with pytest.raises(KernelError, match=r"codes must be a 2-dimensional torch\.int8"):
        kernels.pack(w.float())
    with pytest.raises(KernelError, match="1 <= k <= 131072"):
        kernels.pack(torch.zeros(1, 131073, dtype=torch.int8))


def test_operators_pass_opcheck():
    x, w, w_scale, bias = make(3, 20, 30)
    packed = native.int8_kernels().pack(w)
    torch.library.opcheck(torch.ops.llmq.quantize_per_token.default, (x, EPS))
    torch.library.opcheck(torch.ops.llmq.int8_dynamic_linear.default, (x.bfloat16(), packed, w_scale, bias, 20, EPS))
    torch.library.opcheck(torch.ops.llmq.int8_dynamic_linear.default, (x.half(), packed, w_scale, None, 20, EPS))


def test_operator_checks_n():
    x, w, w_scale, _ = make(3, 20, 30)
    with pytest.raises(KernelError, match="n = 21, got 20"):
        torch.ops.llmq.int8_dynamic_linear(x, native.int8_kernels().pack(w), w_scale, None, 21, EPS)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_kernel_gives_the_weight_back(scale_dtype):
    grid = IntGrid(8, scale_dtype=scale_dtype)
    _, w, w_scale, _ = make(1, 50, 33)
    weight = QuantizedWeight.from_codes(grid, w, w_scale.reshape(50, 1).to(getattr(torch, scale_dtype)))
    case = Case(LinearFormat(grid, FORMAT.activation), 50, 33, torch.bfloat16, "cpu")
    kernel = NativeInt8Dynamic()
    restored = kernel.unpack(kernel.prepack(weight), case)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(weight.tensors, restored.tensors, strict=True))


def test_kernel_says_what_it_cannot_do():
    kernel = NativeInt8Dynamic()
    if not kernel.available().ok:
        pytest.skip(kernel.available().reason)
    assert kernel.supports(Case(FORMAT, 8, 8, torch.float32, "cpu")).ok
    symmetric = FORMAT.activation
    for case, reason in (
        (Case(FORMAT, 8, 8, torch.float32, "cuda"), "for CPUs"),
        (Case(LinearFormat(IntGrid(8)), 8, 8, torch.float32, "cpu"), "symmetric int8 activations"),
        (Case(LinearFormat(IntGrid(8), ActivationGrid(symmetric=False)), 8, 8, torch.float32, "cpu"), "symmetric int8 act"),
        (Case(LinearFormat(IntGrid(8, 4), symmetric), 8, 8, torch.float32, "cpu"), "one scale a row"),
        (Case(LinearFormat(IntGrid(4), symmetric), 8, 8, torch.float32, "cpu"), "8-bit weights"),
        (Case(LinearFormat(IntGrid(8), ActivationGrid(eps=1e-45)), 8, 8, torch.float32, "cpu"), "normal positive"),
        (Case(FORMAT, 8, 131073, torch.float32, "cpu"), "up to 131072 inputs"),
        (Case(FORMAT, 8, 8, torch.float64, "cpu"), "float64"),
    ):
        support = kernel.supports(case)
        assert not support.ok
        assert reason in support.reason
