"""The reference kernel against plain integers and against torchao's per-token quantization; and that its sums are exact."""

from __future__ import annotations

import pytest
import torch
from op_cases import FORMATS, INT8, INT8_ASYMMETRIC, case_of, make_weight, make_x

from llmq.errors import KernelError, UsageError
from llmq.numerics.grid import ActivationGrid, FloatGrid, IntGrid, LinearFormat
from llmq.ops.reference import Reference, exact_chunk, exact_product, largest_product, quantize_activation

REFERENCE = Reference()


@pytest.mark.parametrize("k", [3, 1031, 1032, 1033, 1040, 4100])
def test_integer_products_are_exact_at_their_extremes(k):
    a = torch.full((3, k), 127.0)
    a[1] *= -1
    a[2, ::2] = -126
    b = torch.full((2, k), -128.0)
    b[1, ::3] = 127
    exact = a.to(torch.int64) @ b.T.to(torch.int64)
    assert torch.equal(exact_product(a, b, 127 * 128), exact.float())


def test_the_chunk_is_the_longest_exact_one():
    assert exact_chunk(127 * 128) == 1032
    assert exact_chunk(127 * 128) * 127 * 128 < 2**24 <= (exact_chunk(127 * 128) + 1) * 127 * 128
    assert largest_product(case_of(FORMATS["int8-dynamic"], 8, 64, torch.float32)) == 127 * 128
    assert largest_product(case_of(FORMATS["int8-dynamic-int4"], 8, 64, torch.float32)) == 255 * 8
    assert largest_product(case_of(FORMATS["int8-dynamic-asymmetric-weight"], 8, 64, torch.float32)) == 255 * 255
    with pytest.raises(KernelError, match="integer products"):
        largest_product(case_of(FORMATS["int4"], 8, 64, torch.float32))


@pytest.mark.parametrize("name", [name for name, format_ in FORMATS.items() if isinstance(format_.activation, ActivationGrid)])
def test_int8_activations_equal_integer_arithmetic_done_by_hand(name):
    format_ = FORMATS[name]
    n, k, group = 6, 64, format_.weight.group_size or 64
    weight, x = make_weight(format_, n, k), make_x(4, k, torch.float32)
    got = REFERENCE.linear(x, weight.tensors, None, case_of(format_, n, k, torch.float32))
    codes = weight.codes().tolist()
    for m in range(4):
        row = x[m]
        if format_.activation.symmetric:
            xs = weight.input_scale[0] if format_.activation.static else torch.clamp(row.abs().max() / 127, min=1e-5)
            xq = torch.clamp(torch.round(row * (1 / xs)), -127, 127)
        else:
            low, high = row.min().clamp(max=0), row.max().clamp(min=0)
            xs = torch.clamp((high - low) / 255, min=1e-5)
            xz = torch.clamp(-128 - torch.round(low / xs), -128, 127)
            xq = torch.clamp(torch.round(row * (1 / xs)) + xz, -128, 127) - xz
        xq = [int(code) for code in xq]
        for out in range(n):
            total = 0.0
            for g in range(k // group):
                zero = 0 if weight.zero_point is None else int(weight.zero_point[out, g])
                inner = sum(xq[i] * (codes[out][i] - zero) for i in range(g * group, (g + 1) * group))
                total += inner * weight.scale[out, g].double().item()
            assert got[m, out].item() == pytest.approx(total * xs.double().item(), rel=1e-6, abs=1e-6)


def test_asymmetric_activations_equal_torchao():
    x = make_x(7, 96, torch.float32)
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    scale, zero = primitives.choose_qparams_affine(
        x, primitives.MappingType.ASYMMETRIC, (1, 96), torch.int8, -128, 127, INT8_ASYMMETRIC.eps, torch.float32, torch.int32
    )
    codes = primitives.quantize_affine(x, (1, 96), scale, zero, torch.int8, -128, 127)
    ours, our_scale = quantize_activation(x, INT8_ASYMMETRIC)
    assert torch.equal(our_scale.flatten(), scale)
    assert torch.equal(ours, codes.float() - zero.float().unsqueeze(1))


def test_symmetric_activations_use_127_and_the_smallest_scale():
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-7, 0.0, 0.0]])
    codes, scale = quantize_activation(x, INT8)
    assert scale.flatten().tolist() == pytest.approx([2 / 127, 1e-5, 1e-5])
    assert codes.tolist() == [[64.0, -127.0, 32.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert quantize_activation(x, ActivationGrid(eps=0.5))[1].flatten().tolist() == [0.5, 0.5, 0.5]


def test_a_static_scale_is_the_same_for_all_rows_and_hides_nothing():
    scale = torch.tensor([0.5])
    x = torch.tensor([[0.0, 0.75, 1.25, -63.4, 64.0, -1e30], [0.25, 0.26, 9.0, 0.0, 0.0, 0.0], [1.0, 1.0, float("inf"), 0, 0, 0]])
    codes, scales = quantize_activation(x, ActivationGrid(static=True), scale)
    assert codes[:2].tolist() == [[0, 2, 2, -127, 127, -127], [0, 1, 18, 0, 0, 0]]
    assert codes[2, 2].isnan()
    assert scales.tolist() == [[0.5]] * 3
    empty, none = quantize_activation(x[:0], ActivationGrid(static=True), scale)
    assert empty.shape == (0, 6)
    assert none.shape == (0, 1)


def test_a_static_scale_is_asked_for_and_refused_elsewhere():
    x = torch.ones(1, 4)
    with pytest.raises(UsageError, match="static activations need the input_scale"):
        quantize_activation(x, ActivationGrid(static=True))
    with pytest.raises(UsageError, match="only static activations have an input_scale"):
        quantize_activation(x, INT8, torch.ones(1))


@pytest.mark.parametrize(
    ("format_", "words"),
    [
        (LinearFormat(FloatGrid("bfloat16"), INT8), "integer codes"),
        (LinearFormat(IntGrid(4, 32, symmetric=False, zero_point="float"), INT8), "integer codes"),
        (LinearFormat(IntGrid(4, 48)), "64 inputs cannot be cut into groups of 48"),
    ],
)
def test_says_which_formats_have_no_meaning(format_, words):
    answer = REFERENCE.supports(case_of(format_, 16, 64, torch.bfloat16))
    assert not answer.ok
    assert words in answer.reason


def test_says_which_dtypes_and_lengths_it_cannot_do():
    assert "float64" in REFERENCE.supports(case_of(FORMATS["int4"], 16, 64, torch.float64)).reason
    long = case_of(FORMATS["int8-dynamic-asymmetric-weight"], 16, 40000, torch.float32)
    assert "overflow int32" in REFERENCE.supports(long).reason
