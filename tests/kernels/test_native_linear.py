"""The native linears against their definition, bit for bit, and against fp64: every format, on every instruction set here."""

from __future__ import annotations

import pytest
import torch
from native_cases import (
    EPS,
    KINDS,
    Linear,
    bits,
    block_scale,
    by_definition,
    exact,
    float_of_bits,
    instruction_sets,
    make_float_linear,
    make_linear,
    make_x,
    row_codes,
    same,
)
from torch import Tensor

from llmq.ops import native
from llmq.ops.check import worst_element
from llmq.ops.native_abi import ACTIVATION_FLOAT, ACTIVATION_INT8, SCALE_BF16, SCALE_F32

pytestmark = pytest.mark.usefixtures("native_library")

BF16, F32 = torch.bfloat16, torch.float32
ROWS = (0, 1, 2, 3, 6, 7, 16, 47, 48, 49, 113, 600)
OUTPUTS = (1, 5, 17, 40)
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=instruction_sets())
def kernels(request) -> native.Kernels:
    return native.kernels(request.param)


def check(linear: Linear, x: Tensor, *, bias: bool) -> None:
    """The definition on every instruction set, and the same bits, signs of zeros included, on all."""
    expected = by_definition(x, linear, bias=bias)
    first = None
    for isa in instruction_sets():
        y = linear.times(native.kernels(isa), x, bias=bias)
        assert y.dtype == x.dtype
        where = f"{isa}, {linear.numbers}, {len(x)} rows"
        assert same(y, expected), f"{where}: rows {sorted({*(y != expected).nonzero()[:, 0].tolist()})[:9]} differ"
        first = bits(y) if first is None else first
        assert torch.equal(bits(y), first), where


@every_kind
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_is_the_definition(kind, dtype):
    shapes = (
        (1, 8, 8),
        (5, 100, 100),
        (17, 96, 32),
        (40, 256, 64),
        (5, 1024, 512),
        (17, 1032, 344),
        (40, 520, 520),
        (3, 1056, 264),
    )
    for turn, (n, k, group) in enumerate(shapes):
        linear = make_linear(kind, n, k, group, SCALE_F32 if turn % 2 else SCALE_BF16)
        for m in ROWS[turn % 3 : 10 : 3]:
            check(linear, make_x(m, k, dtype), bias=m % 2 == 0)


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("k", [8, 100, 1032, 5632])
def test_is_the_definition_at_every_size(kind, k):
    groups = {8: (8,), 100: (100,), 1032: (8, 1032), 5632: (32, 64, 128, 256, 512, 5632)}[k]
    for turn, group in enumerate(groups):
        for n in OUTPUTS if k < 5632 else OUTPUTS[turn % 2 :: 2]:
            for scale in (SCALE_BF16, SCALE_F32):
                linear = make_linear(kind, n, k, group, scale)
                dtype = (BF16, F32)[(turn + n + scale) % 2]
                for m in ROWS if k < 1032 else ROWS[1 + n % 2 : 11 : 2]:
                    check(linear, make_x(m, k, dtype), bias=m % 2 == 0)


@every_kind
def test_a_row_more_than_whole_tiles_or_a_chunk(kind):
    """What few rows take another path for, when those rows are the rest of many."""
    for m in (337, 513, 514):
        check(make_linear(kind, 17, 64, 32), make_x(m, 64, BF16), bias=False)


@every_kind
def test_one_group_over_more_blocks_than_many_rows_take_in_turn(kind):
    check(make_linear(kind, 17, 5128, 5128), make_x(48, 5128, BF16), bias=True)


@pytest.mark.slow
@every_kind
def test_many_panels_and_more_rows_than_a_chunk(kind):
    check(make_linear(kind, 300, 512, 128), make_x(113, 512, BF16), bias=True)
    check(make_linear(kind, 70, 264, 88), make_x(1030, 264, F32), bias=True)
    check(make_linear(kind, 17, 5632, 5632), make_x(600, 5632, BF16), bias=False)


@every_kind
def test_is_as_near_to_fp64_as_was_derived(kernels, kind):
    for n, k, group in ((17, 256, 256), (40, 96, 32), (5, 1032, 1032)):
        linear = make_linear(kind, n, k, group)
        for dtype in (BF16, F32) if linear.numbers[-1] != ACTIVATION_FLOAT else (BF16,):
            x = make_x(16, k, dtype)
            for bias in (False, True):
                worst = worst_element(linear.times(kernels, x, bias=bias), exact(x, linear, bias=bias))
                assert worst is None, f"{linear.numbers}: {worst}"


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_float_weights_are_as_near_to_fp64_as_was_derived(kernels, dtype):
    for n, k in ((1, 8), (5, 100), (17, 1), (40, 1032), (70, 513)):
        linear = make_float_linear(dtype, n, k)
        for m in (0, 1, 2, 7, 16, 49):
            x = make_x(m, k, dtype)
            worst = worst_element(linear.times(kernels, x, bias=True), exact(x, linear, bias=True))
            assert worst is None, f"{linear.numbers}, {m} rows: {worst}"


def test_a_block_takes_the_least_step_that_fits(kernels):
    """The other input of the block is half a step, or a step, of the two steps in question."""
    linear = make_linear("int8", 1, 8, 8, SCALE_F32)
    linear.codes[:] = torch.tensor([0, 1, 0, 0, 0, 0, 0, 0])
    linear.scale[:] = 1
    last, first = float_of_bits(0x3FFEFEFF), float_of_bits(0x3FFEFF00)  # 32639.4999 * 2**-14 and 32639.5 * 2**-14
    for exponent in (-111, -30, 0, 30, 111):
        unit = 2.0**exponent
        for largest, step in ((last, 2**-14), (first, 2**-13), (2 - 2**-7, 2**-13), (1.0, 2**-14)):
            assert block_scale(torch.tensor(largest * unit, dtype=torch.float64)) == step * unit
            for probe, expected in ((0.5, 0), (0.51, 1), (1, 1), (1.5, 2), (-2.5, -2)):
                x = torch.tensor([[-largest * unit, probe * step * unit, 0, 0, 0, 0, 0, 0]])
                assert linear.times(kernels, x).item() == expected * step * unit, (exponent, largest, probe)


def test_bf16_inputs_next_to_the_largest_are_exact(kernels):
    """Within 2**-6 of a block's largest every bf16 number is a whole number of steps: nothing is rounded but the end result."""
    linear = make_linear("int8", 40, 256, 256, SCALE_F32)
    linear.scale[:] = torch.where(torch.arange(40) % 2 == 0, 0.25, -8.0)[:, None]
    generator = torch.Generator().manual_seed(0)
    near = torch.rand(16, 256, generator=generator) * (1 - 2**-6) + 2**-6
    near[:, 0] = torch.where(torch.arange(16) % 2 == 0, 1.0, 2 - 2**-7)  # the latter makes the step twice as large
    near[:, 1:] *= near[:, :1]
    x = (near * torch.where(torch.rand(16, 256, generator=generator) < 0.5, -1, 1)).bfloat16().float()
    x = torch.where(x.abs() < x[:, :1].abs() * 2**-6, 0.0, x)
    weight = linear.codes.double() * linear.scale.double()
    assert torch.equal(linear.times(kernels, x), (x.double() @ weight.T).float())


@pytest.mark.parametrize("kind", ["int8", "int4", "int4 + float"])
@pytest.mark.parametrize(("sigma", "share"), [(0, 1 / 100), (2, 1 / 4)], ids=["normal", "log-normal sizes"])
def test_inputs_lose_far_less_than_the_result(kind, sigma, share):
    """What 16-bit block floating point costs beside the rounding of the result to bf16, in root mean square."""
    linear = make_linear(kind, 64, 2048, {"int8": 2048, "int4": 128, "int4 + float": 32}[kind])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 2048, generator=generator) * torch.exp(sigma * torch.randn(2048, generator=generator))
    x = x.bfloat16().float()
    y = exact(x, linear).y
    cost = (linear.times(native.kernels(), x).double() - y).norm()
    assert 0 < cost < share * (y.bfloat16().double() - y).norm()


def test_tiny_blocks_share_the_least_normal_step(kernels):
    linear = make_linear("int8", 1, 8, 8, SCALE_F32)
    linear.codes[:], linear.scale[:] = 1, 1
    x = torch.tensor([[2.0**-126, -(2.0**-149), 3 * 2.0**-127, 2.0**-127, 0, 0, 0, 0]])
    assert linear.times(kernels, x).item() == 3 * 2.0**-126  # 1 + 0 + 2 + 0 steps: ties go to even


@every_kind
def test_numbers_at_the_end_of_the_range(kind):
    linear = make_linear(kind, 17, 64, 32, SCALE_F32)
    x = torch.full((5, 64), 3.4e38) * torch.tensor([1.0, -1.0]).repeat(32)
    x[1], x[2, 1:], x[3] = 2.0**127, 0, x[3].abs()
    check(linear, x, bias=True)
    x[4] = 2.0**-149
    check(linear, x, bias=True)


def test_the_largest_pairs_do_not_saturate():
    """Pairs of products of one sign and the greatest size: what vpmaddubsw clips when its sums are not kept short."""
    for kind in KINDS:
        linear = make_linear(kind, 17, 1024, 1024, SCALE_F32)
        for code in (linear.codes.min().item(), linear.codes.max().item()):
            linear.codes[:] = code
            x = torch.full((7, 1024), 1.0)
            x[1], x[2, 0] = -1.0, -1.0  # asymmetric codes -128 ... 127
            x[3] = torch.tensor([1.0, -1.0]).repeat(512)
            check(linear, x, bias=False)


@every_kind
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_nan_and_spoils_no_other(kernels, kind, bad):
    linear = make_linear(kind, 33, 96, 32)
    x = make_x(7, 96, F32)
    clean = linear.times(kernels, x, bias=True)
    x[4, 69] = bad
    y = linear.times(kernels, x, bias=True)
    assert torch.isnan(y[4]).all()
    others = torch.arange(7) != 4
    assert torch.equal(bits(y[others]), bits(clean[others]))


@pytest.mark.parametrize("kind", ["int8", "int8 x int8", "int8 x static", "int4 + float", "int4 - int x uint8", "bf16", "fp32"])
def test_any_strides_and_addresses(kernels, kind):
    linear = (
        make_float_linear(getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[kind]), 20, 40)
        if kind
        in {
            "bf16",
            "fp32",
        }
        else make_linear(kind, 20, 40, 8)
    )
    packed = linear.pack(kernels)
    for dtype in (F32, BF16, torch.float16):
        x = make_x(6, 40, dtype)
        expected = linear.multiply(kernels, x, packed, linear.bias)
        wide = torch.full((6, 100), float("nan"), dtype=dtype)
        wide[:, 13:53] = x
        interleaved = torch.full((6, 80), float("nan"), dtype=dtype)
        interleaved[:, ::2] = x
        shifted = torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].reshape(6, 40)
        moved = torch.cat([packed.new_zeros(3), packed])[3:]
        ways = {"rows apart": wide[:, 13:53], "columns apart": interleaved[:, ::2], "transposed": x.T.contiguous().T}
        for way, view in {**ways, "one element off": shifted}.items():
            y = linear.multiply(kernels, view, moved, torch.stack([linear.bias] * 2, 1)[:, 0])
            assert y.dtype == dtype
            assert torch.equal(bits(y), bits(expected)), way
        repeated = linear.multiply(kernels, x[2:3].expand(6, 40), packed, linear.bias)
        assert torch.equal(bits(repeated), bits(expected[2:3].expand(6, 20)))


@pytest.mark.parametrize("kind", [*KINDS, "bf16", "fp32"])
def test_neither_threads_nor_neighbours_change_a_bit(kernels, kind, threads):
    floats = {"bf16": BF16, "fp32": F32}
    linear = make_float_linear(floats[kind], 300, 264) if kind in floats else make_linear(kind, 300, 264, 88)
    x = make_x(113, 264, BF16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append((linear.pack(kernels), bits(linear.times(kernels, x, bias=True))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    packed, together = results[0]
    for rows in (slice(0, 1), slice(5, 7), slice(40, 47), slice(50, 99)):
        alone = linear.multiply(kernels, x[rows], packed, linear.bias)
        assert torch.equal(bits(alone), together[rows])


def test_quantizes_by_the_definition(kernels):
    for dtype in (F32, BF16, torch.float16):
        for m, k in ((0, 3), (1, 1), (9, 31), (17, 1111), (49, 256)):
            x = make_x(m, k, dtype)
            codes, scale = kernels.quantize(x, EPS)
            finite = x.float().isfinite().all(dim=1)  # fp16 cannot hold all of these numbers
            expected_codes, expected_scale = row_codes(x, ACTIVATION_INT8) if m else (x, x.new_empty(0, 1))
            assert torch.equal(codes.float(), expected_codes.float())
            assert torch.equal(scale[finite], expected_scale.float().reshape(-1)[finite])
            assert not scale[~finite].isfinite().any()


def test_ties_round_to_even(kernels):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5]])
    codes, scale = kernels.quantize(x, EPS)
    assert scale.item() == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126]]


def test_tiny_rows_are_held_by_eps(kernels):
    codes, scale = kernels.quantize(torch.tensor([[1e-7, -1e-7], [0.0, 0.0], [EPS * 0.5, EPS]]), EPS)
    assert scale.tolist() == [torch.tensor(EPS).item()] * 3
    assert codes.tolist() == [[0, 0], [0, 0], [0, 1]]


def test_codes_of_a_row_that_is_not_finite_are_zero(kernels):
    codes, scale = kernels.quantize(torch.tensor([[1.0, float("nan"), float("inf")], [1.0, float("-inf"), 2.0]]), EPS)
    assert not codes.any()
    assert scale[0].isnan()
    assert scale[1] == float("inf")


def test_static_activations_have_one_scale_whatever_the_row_holds(kernels):
    """By hand: codes are x / scale to the nearest, ties to even, clamped at 127; nothing of the row changes the step."""
    linear = make_linear("int8 x static", 1, 8, 8, SCALE_F32)
    linear.codes[:], linear.scale[:] = torch.tensor([1, 0, 0, 0, 0, 0, 0, 2]), 0.5
    step = linear.input_scale.item()
    for x, code in ((0.0, 0), (0.49, 0), (0.51, 1), (-7.49, -7), (126.6, 127), (127.4, 127), (400, 127), (-1e30, -127)):
        for other, beside in ((0.0, 0), (3.0, 3), (-1e4, -127)):
            row = torch.tensor([[x * step, 0, 0, 0, 0, 0, 0, other * step]])
            y = linear.times(kernels, row).item()
            assert y == torch.tensor((code + 2 * beside) * 0.5) * torch.tensor(step), (x, other)
