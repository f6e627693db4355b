"""Affine quantization: bit for bit what torchao computes, and the properties that do not need an oracle."""

from __future__ import annotations

import functools
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.errors import ShapeError, UsageError
from llmq.numerics.affine import MappingType, ZeroPointDomain, choose_qparams_affine, dequantize_affine, quantize_affine


@functools.cache
def oracle() -> ModuleType:
    """Loaded by the first test that needs it: it loads torch's compiler, which takes seconds."""
    return pytest.importorskip("torchao.quantization.quant_primitives")


SHAPE = (6, 96)
# Blocks of one element are left out: torchao reduces the whole tensor for them (see test_blocks_of_one_element).
BLOCKS = {"per-tensor": (6, 96), "per-channel": (1, 96), "per-group": (1, 32), "per-column": (6, 1), "2-d": (3, 8)}
RANGES = {"int8": (-128, 127), "int8-narrow": (-127, 127), "uint4": (0, 15)}  # hypothesis draws the others
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMBINATIONS = [
    (MappingType.SYMMETRIC, ZeroPointDomain.INT, True),
    (MappingType.SYMMETRIC, ZeroPointDomain.NONE, True),
    (MappingType.SYMMETRIC_NO_CLIPPING_ERR, ZeroPointDomain.INT, True),
    (MappingType.SYMMETRIC_NO_CLIPPING_ERR, ZeroPointDomain.NONE, True),
    (MappingType.ASYMMETRIC, ZeroPointDomain.INT, True),
    (MappingType.ASYMMETRIC, ZeroPointDomain.INT, False),
    (MappingType.ASYMMETRIC, ZeroPointDomain.FLOAT, False),
]


def numbers(kind: str, dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    x = torch.randn(shape, generator=generator) * 3
    if kind == "positive":
        x = x.abs() + 0.5
    elif kind == "negative":
        x = -x.abs() - 0.5
    elif kind == "constant":
        x = torch.full(shape, -1.7)
    elif kind == "zero rows":
        x[::2] = 0
    elif kind == "outlier":
        x[0, 5] = -3000.0
    elif kind == "tiny":
        x = x * 1e-6
    return x.to(dtype)


KINDS = ("normal", "positive", "negative", "constant", "zero rows", "outlier", "tiny")


def oracle_mapping(mapping: MappingType):
    return getattr(oracle().MappingType, mapping.name)


def oracle_qparams(x, mapping, domain, preserve_zero, block, low, high, eps, scale_dtype):
    """The torchao function for the combination, reshaped to one entry a block."""
    arguments = (x, oracle_mapping(mapping), block, torch.int32, low, high, eps, scale_dtype)
    if domain is ZeroPointDomain.FLOAT:
        scale, zero = oracle()._choose_qparams_affine_tinygemm(*arguments, None)
    elif preserve_zero:
        scale, zero = oracle().choose_qparams_affine(*arguments)
    else:
        scale, zero = oracle()._choose_qparams_affine_dont_preserve_zero(*arguments, torch.int32)
    entries = [d // b for d, b in zip(x.shape, block, strict=True)]
    return scale.reshape(entries), None if domain is ZeroPointDomain.NONE else zero.reshape(entries)


def oracle_codes(x, block, scale, zero, domain, low, high):
    if domain is ZeroPointDomain.FLOAT:
        return oracle()._quantize_affine_tinygemm_no_dtype_cast(x, block, scale, zero, low, high)
    if domain is ZeroPointDomain.NONE:
        return oracle()._quantize_affine_no_zero_point_no_dtype_cast(x, block, scale, None, low, high)
    return oracle()._quantize_affine_no_dtype_cast(x, block, scale, zero, low, high)


def oracle_numbers(codes, block, scale, zero, domain, low, high, dtype):
    if domain is ZeroPointDomain.FLOAT:
        return oracle()._dequantize_affine_tinygemm_no_dtype_check(codes, block, scale, zero, low, high, dtype)
    if domain is ZeroPointDomain.NONE:
        return oracle()._dequantize_affine_no_zero_point_no_dtype_check(codes, block, scale, None, low, high, dtype)
    return oracle()._dequantize_affine_no_dtype_check(codes, block, scale, zero, low, high, dtype)


def same_bits(got: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    if got is None or expected is None:
        return got is expected
    return got.dtype == expected.dtype and got.shape == expected.shape and bool((got == expected).all())


def check_against_oracle(x, mapping, domain, preserve_zero, block, low, high, eps, scale_dtype) -> None:
    scale, zero = choose_qparams_affine(
        x,
        mapping,
        block,
        quant_min=low,
        quant_max=high,
        eps=eps,
        scale_dtype=scale_dtype,
        zero_point_domain=domain,
        preserve_zero=preserve_zero,
    )
    expected_scale, expected_zero = oracle_qparams(x, mapping, domain, preserve_zero, block, low, high, eps, scale_dtype)
    assert same_bits(scale, expected_scale)
    assert same_bits(zero, expected_zero)
    ends = {"quant_min": low, "quant_max": high, "zero_point_domain": domain}
    codes = quantize_affine(x, block, scale, zero, output_dtype=torch.int32, **ends)
    assert same_bits(codes, oracle_codes(x, block, scale, zero, domain, low, high).to(torch.int32))
    assert int(codes.min()) >= low
    assert int(codes.max()) <= high
    for dtype in DTYPES:
        got = dequantize_affine(codes, block, scale, zero, output_dtype=dtype, **ends)
        assert same_bits(got, oracle_numbers(codes, block, scale, zero, domain, low, high, dtype))


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: f"{c[0].name}-{c[1].name}-{c[2]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torchao(kind, dtype, combination):
    mapping, domain, preserve_zero = combination
    x = numbers(kind, dtype)
    for block in BLOCKS.values():
        for name, (low, high) in RANGES.items():
            if mapping is MappingType.SYMMETRIC_NO_CLIPPING_ERR and low == 0:
                continue  # torchao divides by zero there; see test_refuses
            if domain is not ZeroPointDomain.INT and name == "int8-narrow":
                continue
            check_against_oracle(x, mapping, domain, preserve_zero, block, low, high, None, None)


@pytest.mark.parametrize("eps", [1e-5, 1.1920929e-07])
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
def test_eps_and_scale_dtype_equal_torchao(eps, scale_dtype):
    for mapping, domain, preserve_zero in COMBINATIONS:
        for kind in ("normal", "zero rows"):
            check_against_oracle(numbers(kind, torch.float32), mapping, domain, preserve_zero, (1, 32), -8, 7, eps, torch.float32)
        scale, _ = choose_qparams_affine(
            numbers("normal", torch.float32),
            mapping,
            (1, 32),
            quant_min=-8,
            quant_max=7,
            eps=eps,
            scale_dtype=scale_dtype,
            zero_point_domain=domain,
            preserve_zero=preserve_zero,
        )
        assert scale.dtype == scale_dtype


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_torchao_on_any_shape(data):
    rank = data.draw(st.integers(1, 3))
    block = data.draw(st.tuples(*[st.integers(1, 5)] * rank).filter(lambda sizes: max(sizes) > 1))
    counts = tuple(data.draw(st.integers(1, 4)) for _ in range(rank))
    shape = tuple(b * c for b, c in zip(block, counts, strict=True))
    size = torch.Size(shape).numel()
    values = data.draw(st.lists(st.floats(-1000, 1000, width=16), min_size=size, max_size=size))
    x = torch.tensor(values, dtype=data.draw(st.sampled_from(DTYPES))).reshape(shape)
    mapping, domain, preserve_zero = data.draw(st.sampled_from(COMBINATIONS))
    bits = data.draw(st.integers(2, 8))
    low = -(1 << (bits - 1)) if mapping is not MappingType.ASYMMETRIC or data.draw(st.booleans()) else 0
    check_against_oracle(x, mapping, domain, preserve_zero, block, low, low + (1 << bits) - 1, 1e-3, None)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=12, max_size=12),
    bits=st.integers(2, 8),
    combination=st.sampled_from(COMBINATIONS[2:]),  # SYMMETRIC clips half a step on purpose
)
def test_error_is_at_most_half_a_step(values, bits, combination):
    mapping, domain, preserve_zero = combination
    x = torch.tensor(values, dtype=torch.float64).reshape(3, 4)
    low = -(1 << (bits - 1)) if mapping is not MappingType.ASYMMETRIC else 0
    ends = {"quant_min": low, "quant_max": low + (1 << bits) - 1, "zero_point_domain": domain}
    scale, zero = choose_qparams_affine(x, mapping, (1, 4), eps=1e-6, preserve_zero=preserve_zero, **ends)
    codes = quantize_affine(x, (1, 4), scale, zero, output_dtype=torch.int16, **ends)
    back = dequantize_affine(codes, (1, 4), scale, zero, output_dtype=torch.float64, **ends)
    # An integer zero point is itself rounded, which can push one end of the range out by another half step.
    steps = 1.0 if domain is ZeroPointDomain.INT and mapping is MappingType.ASYMMETRIC else 0.5
    covers = preserve_zero or domain is ZeroPointDomain.FLOAT
    if covers:
        assert bool(((x - back).abs() <= scale * (steps + 1e-6)).all())


def test_zero_is_kept_where_it_is_promised():
    x = numbers("positive", torch.float32)
    x[:, 3] = 0
    for mapping, domain, preserve_zero in COMBINATIONS:
        if preserve_zero:
            ends = {"quant_min": -8, "quant_max": 7, "zero_point_domain": domain}
            scale, zero = choose_qparams_affine(x, mapping, (1, 32), **ends)
            codes = quantize_affine(x, (1, 32), scale, zero, output_dtype=torch.int8, **ends)
            assert bool((dequantize_affine(codes, (1, 32), scale, zero, **ends)[:, 3] == 0).all())


def test_blocks_of_one_element():
    x = numbers("normal", torch.float32, (2, 3))
    scale, zero = choose_qparams_affine(x, MappingType.SYMMETRIC, (1, 1), quant_min=-127, quant_max=127)
    assert torch.equal(scale, x.abs() / 127)
    assert zero.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_ties_go_to_even_and_the_ends_are_clamped():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 100.0, -100.0]])
    codes = quantize_affine(
        x,
        (1, 7),
        torch.ones(1, 1),
        None,
        output_dtype=torch.int8,
        quant_min=-8,
        quant_max=7,
        zero_point_domain=ZeroPointDomain.NONE,
    )
    assert codes.tolist() == [[0, 2, 2, 0, -2, 7, -8]]


def test_float_zero_point_is_the_number_at_mid_grid():
    codes = torch.tensor([[8, 0, 15]], dtype=torch.uint8)
    got = dequantize_affine(
        codes,
        (1, 3),
        torch.tensor([[0.5]]),
        torch.tensor([[10.0]]),
        quant_min=0,
        quant_max=15,
        zero_point_domain=ZeroPointDomain.FLOAT,
    )
    assert got.tolist() == [[10.0, 6.0, 13.5]]


def test_strided_input_gives_the_same_codes():
    x = numbers("normal", torch.float32, (96, 6)).T
    ends = {"quant_min": -8, "quant_max": 7}
    scale, zero = choose_qparams_affine(x, MappingType.SYMMETRIC, (1, 32), **ends)
    codes = quantize_affine(x, (1, 32), scale, zero, output_dtype=torch.int8, **ends)
    assert torch.equal(codes, quantize_affine(x.contiguous(), (1, 32), scale, zero, output_dtype=torch.int8, **ends))


ONE = torch.ones(1, 1)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (UsageError, "preserve_zero=False", {"mapping": MappingType.ASYMMETRIC, "domain": ZeroPointDomain.FLOAT}),
        (UsageError, "needs a zero point", {"mapping": MappingType.ASYMMETRIC, "domain": ZeroPointDomain.NONE}),
        (UsageError, "always represents zero", {"mapping": MappingType.SYMMETRIC, "preserve_zero": False}),
        (UsageError, "quant_min < 0 < quant_max", {"mapping": MappingType.SYMMETRIC_NO_CLIPPING_ERR, "low": 0}),
        (UsageError, "smaller than quant_max", {"mapping": MappingType.SYMMETRIC, "low": 7}),
        (
            UsageError,
            "can be quantized, got torch.int8",
            {"mapping": MappingType.SYMMETRIC, "x": torch.ones(2, 4, dtype=torch.int8)},
        ),
        (ShapeError, "do not tile", {"mapping": MappingType.SYMMETRIC, "block": (1, 3)}),
        (ShapeError, "do not tile", {"mapping": MappingType.SYMMETRIC, "block": (4,)}),
        (ShapeError, "empty", {"mapping": MappingType.SYMMETRIC, "x": torch.ones(0, 4)}),
    ],
)
def test_choose_refuses(error, words, call):
    with pytest.raises(error, match=words):
        choose_qparams_affine(
            call.get("x", torch.ones(2, 4)),
            call["mapping"],
            call.get("block", (1, 4)),
            quant_min=call.get("low", -8),
            quant_max=7,
            zero_point_domain=call.get("domain", ZeroPointDomain.INT),
            preserve_zero=call.get("preserve_zero", True),
        )


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (UsageError, "cannot hold", {"output_dtype": torch.uint8}),
        (UsageError, "needs a zero point, got none", {"zero_point": None}),
        (UsageError, "has no zero point, got one", {"zero_point_domain": ZeroPointDomain.NONE}),
        (ShapeError, r"the scale of blocks .* has shape \[1, 1\], got \[2, 1\]", {"scale": torch.ones(2, 1)}),
        (ShapeError, "zero point", {"zero_point": torch.ones(1)}),
    ],
)
def test_quantize_refuses(error, words, change):
    call = {"scale": ONE, "zero_point": ONE, "output_dtype": torch.int8, "quant_min": -8, "quant_max": 7, **change}
    with pytest.raises(error, match=words):
        quantize_affine(torch.ones(1, 4), (1, 4), call.pop("scale"), call.pop("zero_point"), **call)


def test_dequantize_refuses_an_integer_result():
    with pytest.raises(UsageError, match="dequantized numbers are"):
        dequantize_affine(ONE.to(torch.int8), (1, 1), ONE, ONE, quant_min=-8, quant_max=7, output_dtype=torch.int32)


@pytest.mark.parametrize("domain", list(ZeroPointDomain))
@pytest.mark.parametrize("scale", [0.0, -0.0, 2.0**-129, -(2.0**-149)])
def test_a_scale_without_a_reciprocal_gives_codes_that_mean_next_to_nothing(domain, scale):
    x = torch.tensor([[0.0, -0.0, 1.5, -1.5, 3e38, -3e38, 2.0**-149, 1e-30]])
    symmetric = domain is ZeroPointDomain.NONE
    low, high = (-8, 7) if symmetric else (0, 15)
    s = torch.tensor([[scale]])
    z = None if symmetric else torch.tensor([[5.0 if domain is ZeroPointDomain.INT else 1.5]])
    ends = {"quant_min": low, "quant_max": high, "zero_point_domain": domain}
    codes = quantize_affine(x, (1, 8), s, z, output_dtype=torch.float32, **ends)
    assert bool(((codes >= low) & (codes <= high)).all())  # and no NaN
    if domain is not ZeroPointDomain.FLOAT:
        assert torch.equal(codes, torch.full_like(x, 0.0 if z is None else 5.0))
    meant = dequantize_affine(codes, (1, 8), s, z, **ends)
    nothing = z.expand_as(x) if domain is ZeroPointDomain.FLOAT else torch.zeros_like(x)
    assert bool(((meant - nothing).abs() <= 15 * abs(scale)).all())


@pytest.mark.parametrize("domain", list(ZeroPointDomain))
def test_a_negative_scale_turns_the_grid_round(domain):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 64, generator=generator)
    symmetric = domain is ZeroPointDomain.NONE
    low, high = (-8, 7) if symmetric else (0, 15)
    s = -0.1 - torch.rand(5, 2, generator=generator) / 2
    z = None if symmetric else torch.full((5, 2), 6.0 if domain is ZeroPointDomain.INT else 0.25)
    ends = {"quant_min": low, "quant_max": high, "zero_point_domain": domain}
    codes = quantize_affine(x, (1, 32), s, z, output_dtype=torch.float32, **ends)
    every = torch.stack([dequantize_affine(torch.full_like(x, q), (1, 32), s, z, **ends) for q in range(low, high + 1)])
    nearest = (every - x).abs().amin(dim=0)
    assert torch.allclose((dequantize_affine(codes, (1, 32), s, z, **ends) - x).abs(), nearest, atol=1e-6)
    assert int(codes.min()) == low  # both ends of the grid are there to be used
    assert int(codes.max()) == high
