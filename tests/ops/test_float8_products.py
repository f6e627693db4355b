"""Float8 products: the reference by hand, what tensor cores may lose, and what is said where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from op_cases import FORMATS, assert_kernel_close, case_of, make_weight, make_x
from torch import nn
from torch._subclasses import FakeTensorMode

from llmq.errors import KernelError
from llmq.numerics.grid import Float8Activation, Float8Grid, LinearFormat
from llmq.numerics.weight import QuantizedWeight, same_bits
from llmq.ops import cuda
from llmq.ops.check import exact_for, exact_linear, worst_element
from llmq.ops.dense import DequantGemm
from llmq.ops.float8 import ScaledMm, TritonFloat8
from llmq.ops.reference import Reference, quantize_activation
from llmq.ops.select import prepare
from llmq.ops.tensor import QuantizedTensor

ROW, TENSOR = Float8Activation(), Float8Activation("tensor")
NAMES = ("float8-weight-only", "float8-dynamic", "float8-dynamic-tensor")


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_equals_sums_of_products_done_by_hand(name):
    form = FORMATS[name]
    weight, x = make_weight(form, 6, 48), make_x(4, 48, torch.float32)
    got = Reference().linear(x, weight.tensors, None, case_of(form, 6, 48, torch.float32))
    numbers, scales = weight.qdata.double().tolist(), weight.scale.double().flatten().tolist()
    largest = x.abs().max()
    for m in range(4):
        step, row = 1.0, x[m].tolist()
        if form.activation is not None:
            shared = largest if form.activation.granularity == "tensor" else x[m].abs().max()
            scale = torch.clamp(shared / 448, min=1e-12)
            step, row = scale.double().item(), (x[m] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double().tolist()
        for n in range(6):
            terms = [a * b for a, b in zip(row, numbers[n], strict=True)]
            size = sum(map(abs, terms)) * abs(step * scales[n])
            assert got[m, n].item() == pytest.approx(sum(terms) * step * scales[n], rel=0, abs=60 * 2.0**-24 * size + 1e-40)


def test_a_scale_is_shared_by_a_token_or_by_all():
    x = torch.tensor([[448.0, 1.0, -0.3], [0.0, 0.0, 0.0], [0.5, -0.25, 1.0]])
    codes, scale = quantize_activation(x, ROW)
    assert scale.flatten().tolist() == pytest.approx([1.0, 1e-12, 1 / 448])
    assert codes[:2].tolist() == [[448.0, 1.0, -0.3125], [0.0, 0.0, 0.0]]
    assert codes[2].tolist() == [224.0, -112.0, 448.0]
    codes, scale = quantize_activation(x, TENSOR)
    assert scale.tolist() == [[1.0]] * 3
    assert codes[2].tolist() == [0.5, -0.25, 1.0]
    empty, none = quantize_activation(x[:0], TENSOR)
    assert (empty.shape, none.shape) == ((0, 3), (0, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_row_breaks_itself_alone_even_where_the_scale_is_shared(bad):
    x = torch.tensor([[1.0, -2.0], [3.0, bad], [448.0, 0.0]])
    for grid in (ROW, TENSOR):
        codes, scale = quantize_activation(x, grid)
        assert not (codes[1] * scale[1]).isfinite().any()
        kept, alone = quantize_activation(x[[0, 2]], grid)
        assert torch.equal(codes[[0, 2]], kept)
        assert torch.equal(scale[[0, 2]], alone)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_catches_one_wrong_scale_and_one_wrong_code(name, dtype):
    form = FORMATS[name]
    case, weight, x = case_of(form, 16, 128, dtype), make_weight(form, 16, 128), make_x(5, 128, dtype)
    y = Reference().linear(x, weight.tensors, None, case)
    assert worst_element(y, exact_linear(x, weight, None, case)) is None
    scale = weight.scale.clone()
    scale[5] *= 1.05
    wrong = QuantizedWeight.from_codes(weight.grid, weight.qdata, scale)
    assert "columns [5]" in worst_element(y, exact_linear(x, wrong, None, case))
    patterns = weight.qdata.view(torch.uint8).clone()
    patterns[7, (patterns[7] & 127).argmax()] ^= 0x80  # a sign
    wrong = QuantizedWeight.from_codes(weight.grid, patterns.view(torch.float8_e4m3fn), weight.scale)
    assert worst_element(Reference().linear(x, wrong.tensors, None, case), exact_linear(x, weight, None, case)) is not None


def test_many_outputs_are_multiplied_in_blocks_that_keep_their_scales():
    for name in NAMES:
        form = FORMATS[name]
        n, k = 300, 4096  # more than a block of elements
        weight, x = make_weight(form, n, k), make_x(3, k, torch.bfloat16)
        case, bias = case_of(form, n, k, torch.bfloat16), torch.randn(n).bfloat16()
        y = DequantGemm().linear(x, weight.tensors, bias, case)
        assert_kernel_close(y, x, weight, bias, case, name)


def tensor_core_sum(terms: torch.Tensor, promote: int) -> torch.Tensor:
    """Sum products [..., K] as Ada's and Hopper's float8 tensor cores are known to: 32 at a time, 14 bits of the largest.

    Args:
        terms: fp64, exact products.
        promote: products after which the sum is added to one in fp32.
    """
    total = terms.new_zeros(terms.shape[:-1])
    for start in range(0, terms.shape[-1], promote):
        held = terms.new_zeros(terms.shape[:-1])
        for step in range(start, min(start + promote, terms.shape[-1]), 32):
            addends = torch.cat([terms[..., step : step + 32], held[..., None]], dim=-1)
            exponent = torch.frexp(addends.abs().amax(dim=-1, keepdim=True))[1] - 1  # 2**exponent <= largest
            unit = torch.ldexp(torch.ones_like(total)[..., None], exponent - 13)
            held = (torch.floor(addends / unit) * unit).sum(dim=-1)  # two's complement: towards minus infinity
            exponent = torch.frexp(held.abs())[1] - 1
            unit = torch.ldexp(torch.ones_like(total), exponent - 13)
            held = torch.trunc(held / unit) * unit
        total = (total + held).float().double()
    return total


@pytest.mark.parametrize("data", ["random", "one large", "one sign"])
def test_what_tensor_cores_lose_is_within_the_slack_and_not_within_the_bound_of_fp32(data):
    form, k = FORMATS["float8-dynamic"], 1024
    case, weight, x = case_of(form, 32, k, torch.bfloat16), make_weight(form, 32, k), make_x(8, k, torch.bfloat16)
    if data == "one large":
        x[:, ::128] *= 60
    elif data == "one sign":
        x, weight = x.abs(), QuantizedWeight.from_codes(weight.grid, (weight.qdata.view(torch.uint8) & 127).view(
            torch.float8_e4m3fn), weight.scale)  # fmt: skip
    codes, scale = quantize_activation(x, ROW)
    terms = codes.double()[:, None, :] * weight.qdata.double()[None]
    y = (tensor_core_sum(terms, 128) * scale.double() * weight.scale.double().T).to(torch.bfloat16)
    assert worst_element(y, exact_linear(x, weight, None, case)) is not None
    assert worst_element(y, exact_for(ScaledMm(), x, weight, None, case)) is None
    assert_kernel_close(Reference().linear(x, weight.tensors, None, case), x, weight, None, case, "reference")


def test_other_kernels_have_no_slack():
    form = FORMATS["float8-dynamic"]
    case, weight, x = case_of(form, 16, 64, torch.bfloat16), make_weight(form, 16, 64), make_x(2, 64, torch.bfloat16)
    plain = exact_linear(x, weight, None, case).bound
    assert torch.equal(exact_for(DequantGemm(), x, weight, None, case).bound, plain)
    assert (exact_for(ScaledMm(), x, weight, None, case).bound >= plain).all()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a compute capability, as far as torch says."""

    def put_in(capability):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return put_in


def test_names_the_gpu_it_needs(gpu, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dynamic = case_of(FORMATS["float8-dynamic"], 64, 128, torch.bfloat16, "cuda")
    weights = case_of(FORMATS["float8-weight-only"], 64, 128, torch.bfloat16, "cuda")
    for kernel, case in ((ScaledMm(), dynamic), (TritonFloat8(), weights)):
        assert kernel.fits(case).ok
        gpu((8, 0))
        assert kernel.supports(case).reason == "it needs compute capability 8.9, and this GPU has 8.0"
        gpu((8, 9))
        assert kernel.supports(case).ok == kernel.available().ok
    assert ScaledMm().supports(dynamic).ok
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA" in ScaledMm().supports(dynamic).reason


@pytest.mark.parametrize(
    ("kernel", "name", "n", "k", "dtype", "words"),
    [
        (ScaledMm(), "float8-weight-only", 16, 32, torch.bfloat16, "it takes float8 activations"),
        (ScaledMm(), "int8-dynamic", 16, 32, torch.bfloat16, "it takes float8 weights"),
        (ScaledMm(), "float8-dynamic", 16, 32, torch.float32, "gives bfloat16 only, and the activations are torch.float32"),
        (ScaledMm(), "float8-dynamic", 24, 32, torch.bfloat16, "multiples of 16 inputs and outputs, and N is 24"),
        (ScaledMm(), "float8-dynamic", 32, 40, torch.bfloat16, "K is 40"),
        (TritonFloat8(), "float8-dynamic", 16, 32, torch.bfloat16, "does not quantize activations"),
        (TritonFloat8(), "bf16", 16, 32, torch.bfloat16, "it takes float8 weights"),
        (TritonFloat8(), "float8-weight-only", 16, 32, torch.float32, "bfloat16 and float16 activations"),
        (TritonFloat8(), "float8-weight-only", 16, 40, torch.float16, "multiples of 16 inputs, and K is 40"),
    ],
)
def test_names_the_limit(kernel, name, n, k, dtype, words):
    answer = kernel.fits(case_of(FORMATS[name], n, k, dtype, "cuda"))
    assert not answer.ok
    assert words in answer.reason
    assert "the weight is on cpu" in kernel.supports(case_of(FORMATS[name], n, k, dtype)).reason


def test_kernels_of_integers_refuse_float8():
    case = case_of(FORMATS["float8-dynamic"], 64, 128, torch.bfloat16, "cuda")
    assert "symmetric 8-bit weights" in cuda.CudaIntMm().fits(case).reason
    assert "does not quantize activations" in cuda.Tinygemm().fits(case).reason


@pytest.mark.parametrize("name", ["float8-dynamic", "float8-dynamic-tensor"])
def test_hands_over_what_the_gpu_s_product_takes(name, monkeypatch):
    """Scales [M, 1] and [1, N] in fp32, the second operand by columns, and sums that go over to fp32."""
    form, seen = FORMATS[name], {}

    def product(a, b, scale_a, scale_b, **options):
        seen.update(a=a, b=b, scale_a=scale_a, scale_b=scale_b, **options)
        return torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    case = case_of(form, 48, 64, torch.bfloat16)
    bias = torch.ones(48, dtype=torch.bfloat16)
    y = ScaledMm().linear(make_x(64, 5, torch.bfloat16).T, make_weight(form, 48, 64).tensors, bias, case)
    assert torch.equal(y, torch.ones(5, 48, dtype=torch.bfloat16))
    assert (seen["a"].dtype, seen["a"].shape, seen["a"].stride()) == (torch.float8_e4m3fn, (5, 64), (64, 1))
    assert (seen["b"].dtype, seen["b"].shape, seen["b"].stride()) == (torch.float8_e4m3fn, (64, 48), (1, 64))
    assert (seen["scale_a"].dtype, seen["scale_a"].shape, seen["scale_a"].is_contiguous()) == (torch.float32, (5, 1), True)
    assert (seen["scale_b"].dtype, seen["scale_b"].shape, seen["scale_b"].is_contiguous()) == (torch.float32, (1, 48), True)
    assert (seen["out_dtype"], seen["use_fast_accum"]) == (torch.bfloat16, False)


def test_traced_graphs_know_the_shapes():
    with FakeTensorMode():  # torch's own fake of its product asks a GPU for its name
        for kernel, name, device in ((ScaledMm(), "float8-dynamic", "cpu"), (TritonFloat8(), "float8-weight-only", "cuda")):
            case = case_of(FORMATS[name], 32, 64, torch.bfloat16, "cuda")
            x, bias = (torch.empty(*shape, dtype=torch.bfloat16, device=device) for shape in ((3, 64), (32,)))
            weight = torch.empty(32, 64, dtype=torch.float8_e4m3fn, device=device)
            scale = torch.empty(32, 1, device=device)
            for rows in (x, torch.empty(0, 64, dtype=torch.bfloat16, device=device)):
                y = kernel.linear(rows, (weight, scale), bias, case)
                assert (y.shape, y.dtype) == ((len(rows), 32), torch.bfloat16)


def test_without_triton_s_gpu_the_operator_says_so(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    weight = make_weight(FORMATS["float8-weight-only"], 16, 32)
    case = case_of(FORMATS["float8-weight-only"], 16, 32, torch.bfloat16)
    with pytest.raises(KernelError, match="CUDA GPU, and these are on cpu"):
        TritonFloat8().linear(make_x(2, 32, torch.bfloat16), weight.tensors, None, case)


def test_a_linear_runs_moves_and_is_copied_bit_for_bit():
    for name in NAMES:
        form = FORMATS[name]
        linear = nn.Linear(64, 48, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
        weight = make_weight(form, 48, 64)
        linear.weight = nn.Parameter(QuantizedTensor.from_weight(weight, form, torch.bfloat16), requires_grad=False)
        x = make_x(5, 64, torch.bfloat16)
        before = linear(x)
        (choice,) = prepare(linear)
        assert choice.kernels == "dequant-gemm"
        assert "the weight is on cpu" in choice.rejected["triton-float8"]
        assert_kernel_close(linear(x), x, weight, linear.bias, case_of(form, 48, 64, torch.bfloat16), name)
        assert (linear(x).float() - before.float()).abs().max() <= before.float().abs().max() * 2.0**-7
        assert all(same_bits(a, b) for a, b in zip(linear.weight.weight.tensors, weight.tensors, strict=True))
        assert linear.weight.nbytes_stored == form.nbytes(48, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float8-weight-only", "float8-dynamic"])
def test_compiles_without_a_break(name):
    form = FORMATS[name]
    linear = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    weight = make_weight(form, 48, 64)
    linear.weight = nn.Parameter(QuantizedTensor.from_weight(weight, form, torch.bfloat16), requires_grad=False)
    prepare(linear)
    x = make_x(5, 64, torch.bfloat16)
    y = torch.compile(linear, fullgraph=True)(x)
    assert_kernel_close(y, x, weight, None, case_of(form, 48, 64, torch.bfloat16), name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kernel", [ScaledMm(), TritonFloat8()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(kernel, name):
    form = FORMATS[name]
    for n, k in ((48, 384), (256, 4096)):
        case = case_of(form, n, k, torch.bfloat16, "cuda")
        if not kernel.supports(case).ok:
            pytest.skip(kernel.supports(case).reason)
        weight = make_weight(form, n, k)
        packed = kernel.prepack(weight.to("cuda"))
        for m in (0, 1, 3, 16, 17, 64, 300):
            x = make_x(m, k, torch.bfloat16)
            y = kernel.linear(x.cuda(), packed, None, case).cpu()
            on_cpu = case_of(form, n, k, torch.bfloat16)
            assert worst_element(y, exact_for(kernel, x, weight, None, on_cpu)) is None


def test_formats_have_their_scales_where_they_say():
    assert make_weight(LinearFormat(Float8Grid("float16"), TENSOR), 8, 32).scale.dtype == torch.float16
