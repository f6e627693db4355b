"""The weight-only Triton kernels, in Triton's interpreter or on a GPU, against the exact result."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from op_cases import FORMATS, assert_kernel_close, case_of, make_weight, make_x

from llmq.numerics.grid import IntGrid, LinearFormat
from llmq.ops import triton_support
from llmq.ops.tensor import QuantizedTensor, Spec
from llmq.ops.triton_weight_only import TritonInt4, TritonInt8

BF16 = torch.bfloat16
ROWS = (0, 1, 2, 3, 7, 8, 16, 17, 64)
INT8 = {name: FORMATS[name] for name in ("int8-weight-only", "int8-weight-only-fp32-scale", "int8-groups")} | {
    "int8-groups-of-48": LinearFormat(IntGrid(8, 48, scale_dtype="bfloat16"))
}
ZEROS = {"symmetric": (True, "none"), "integer": (False, "int"), "float": (False, "float")}
INT4 = {name: FORMATS[name] for name in ("int4-per-channel", "int3", "int3-float-zero", "int2", "int2-integer-zero")} | {
    f"int4-{name}-{group}": LinearFormat(IntGrid(4, group, symmetric, zero, dtype))
    for name, (symmetric, zero) in ZEROS.items()
    for group, dtype in ((32, "bfloat16"), (64, "float32"), (96, "bfloat16"), (128, "float16"), (256, "bfloat16"))
}
ALL = {**{name: (TritonInt8(), format_) for name, format_ in INT8.items()}, **{n: (TritonInt4(), f) for n, f in INT4.items()}}
KINDS = ("int8-weight-only", "int8-groups", "int4-symmetric-32", "int4-integer-64", "int4-float-128", "int4-per-channel")


@pytest.fixture
def few(monkeypatch):
    """One multiprocessor: programs of several outputs, and the fewest of them."""
    monkeypatch.setattr(triton_support, "multiprocessors", lambda device: 1)


class Packed:
    """A weight in the layout of its kernel, on the device where that runs."""

    def __init__(self, name, n, k, device, dtype=BF16, weight=None):
        self.kernel, form = ALL[name]
        self.device = device
        self.case = case_of(form, n, k, dtype, "cuda")
        assert self.kernel.fits(self.case).ok, self.kernel.fits(self.case).reason
        self.weight = weight or make_weight(form, n, k)
        self.tensors = self.kernel.prepack(self.weight.to(device))

    def __call__(self, x, bias=None):
        y = self.kernel.linear(x.to(self.device), self.tensors, None if bias is None else bias.to(self.device), self.case)
        return y.cpu()

    def check(self, x, bias=None, of=None):
        assert_kernel_close(
            self(x, bias), x if of is None else of, self.weight, bias, replace(self.case, device="cpu"), self.kernel.name
        )


def odd_k(name):
    """An odd number of groups, more than 256 inputs."""
    group = ALL[name][1].weight.group_size or 32
    return group * (256 // group + 1 + 256 // group % 2)


@pytest.mark.parametrize("name", ALL)
def test_close_to_the_exact_result(name, triton_device, few):
    packed = Packed(name, 50, odd_k(name), triton_device)
    for m in (1, 3):
        packed.check(make_x(m, packed.case.k, BF16))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_any_number_of_rows(name, triton_device, few):
    packed = Packed(name, 9, odd_k(name), triton_device)
    for m in ROWS:
        packed.check(make_x(m, packed.case.k, BF16))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_bias_is_added_before_the_only_rounding(name, triton_device, few):
    for dtype in (BF16, torch.float16):
        packed = Packed(name, 5, 1088 if name in {"int8-weight-only", "int4-per-channel"} else odd_k(name), triton_device, dtype)
        bias = torch.randn(5, generator=torch.Generator().manual_seed(2)).to(dtype)
        for m in (1, 2, 17):
            packed.check(make_x(m, packed.case.k, dtype), bias)


@pytest.mark.parametrize("k", [1, 15, 33, 131, 2064])
def test_int8_rows_of_any_length(k, triton_device, few):
    packed = Packed("int8-weight-only", 7, k, triton_device)
    for m in (1, 4):
        packed.check(make_x(m, k, BF16))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8-weight-only", "int4-float-128"])
def test_k_in_parts(name, triton_device, monkeypatch):
    monkeypatch.setattr(triton_support, "multiprocessors", lambda device: 132)
    k = 128 * 33  # the last part has one step of many
    packed = Packed(name, 3, k, triton_device)
    cuts = triton_support.load("weight_only")
    gpu = cuts.Gpu(132, 227 << 10)
    one = triton_support.load("weight_only_int8").launch(1, 3, k, k, gpu)
    some = triton_support.load("weight_only_int4").launch(5, 3, k, gpu)
    assert one.cuts > 1
    assert some.cuts > 1
    for m in (1, 5):
        x = make_x(m, k, BF16)
        packed.check(x, torch.ones(3, dtype=BF16))
        assert torch.equal(packed(x), packed(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_scales_may_be_any_finite_numbers(name, triton_device, few):
    plain = Packed(name, 3, ALL[name][1].weight.group_size or 96, triton_device)
    numbers = torch.randn(plain.weight.scale.shape, generator=torch.Generator().manual_seed(5))
    dtype = plain.weight.scale.dtype
    least = 2.0 ** (-24 if dtype == torch.float16 else -133)
    for scale in (-numbers.abs(), torch.zeros_like(numbers), numbers * 2 * least, numbers * 2.0**14):
        weight = replace(plain.weight, scale=scale.to(dtype))
        packed = Packed(name, 3, plain.case.k, triton_device, weight=weight)
        for m, size in ((1, 1.0), (2, 2.0**40), (1, 2.0**-100)):
            packed.check(size * make_x(m, plain.case.k, BF16))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_strides_and_addresses_do_not_matter(name, triton_device, few):
    packed = Packed(name, 6, odd_k(name), triton_device)
    k = packed.case.k
    for m in (1, 3):
        x = make_x(m, k, BF16)
        on_device = x.to(triton_device)
        offset = torch.empty(m * k + 3, dtype=BF16, device=triton_device)[3:].view(m, k).copy_(on_device)
        wide = torch.full((m, k + 5), 9.0, dtype=BF16, device=triton_device)
        wide[:, 5:] = on_device
        second = torch.full((2 * m, k), 9.0, dtype=BF16, device=triton_device)
        second[::2] = on_device
        for view in (offset, wide[:, 5:], second[::2], on_device.T.contiguous().T):
            packed.check(view, of=x)


def test_an_int8_weight_may_begin_anywhere(triton_device, few):
    packed = Packed("int8-weight-only", 6, 320, triton_device)
    codes, scale = packed.tensors
    moved = torch.empty(codes.numel() + 3, dtype=torch.int8, device=triton_device)[3:].view(codes.shape).copy_(codes)
    packed.tensors = (moved, scale)
    for m in (1, 2):
        packed.check(make_x(m, 320, BF16))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row_and_is_not_hidden(name, value, triton_device, few):
    packed = Packed(name, 6, odd_k(name), triton_device)
    k = packed.case.k
    x = make_x(5, k, BF16)
    poisoned = x.clone()
    poisoned[3, k // 2] = value
    touched = packed.weight.dequantize()[:, k // 2] != 0
    y = packed(poisoned)
    kept = [0, 1, 2, 4]
    assert not bool(y[3, touched].isfinite().any())
    assert torch.equal(y[kept], packed(x)[kept])
    assert not bool(packed(poisoned[3:4])[0, touched].isfinite().any())


@pytest.mark.parametrize("name", ALL)
def test_unpacks_bit_for_bit(name, triton_device):
    for n, k in ((50, odd_k(name)), (1, odd_k(name))):
        packed = Packed(name, n, k, triton_device)
        back = packed.kernel.unpack(packed.tensors, packed.case).to("cpu")
        for ours, theirs in zip(packed.weight.tensors, back.tensors, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def test_the_words_of_int4(triton_device):
    kernels = triton_support.load("weight_only_int4")
    codes = (torch.arange(32) % 16).to(torch.uint8)[None]  # a period of 32 inputs, 4 words
    # word j: inputs 2j, 8 + 2j, 16 + 2j, 24 + 2j in the low half, their neighbours in the high one
    assert [f"{word & 0xFFFFFFFF:08x}" for word in kernels.pack(codes, 32)[0].tolist()] == [
        "91918080",
        "b3b3a2a2",
        "d5d5c4c4",
        "f7f7e6e6",
    ]
    assert [kernels.period_of(group) for group in (32, 64, 96, 128, 192, 256, 4096)] == [32, 64, 32, 128, 64, 128, 128]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8-weight-only", "int4-integer-64", "int4-symmetric-32"])
def test_operators_keep_their_promises(name, triton_device, few):
    packed = Packed(name, 6, odd_k(name), triton_device)
    x = make_x(2, packed.case.k, BF16).to(triton_device)
    operator = torch.ops.llmq.triton_int8_weight_linear if name.startswith("int8") else torch.ops.llmq.triton_int4_weight_linear
    zero = () if name.startswith("int8") else (packed.tensors[2] if len(packed.tensors) > 2 else None,)
    torch.library.opcheck(
        operator,
        (x, *packed.tensors[:2], *zero, None),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8-weight-only", "int4-float-128"])
def test_compiled_graphs_call_them(name, triton_device, few):
    packed = Packed(name, 6, odd_k(name), triton_device)
    case = replace(packed.case, device=triton_device)
    spec = Spec(case, packed.kernel.layout, (packed.kernel.name,))
    weight = QuantizedTensor(packed.tensors, spec)
    x = make_x(3, case.k, BF16).to(triton_device)
    graph = torch.compile(lambda x: torch.nn.functional.linear(x, weight), fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(graph(x), packed.kernel.linear(x, packed.tensors, None, case))


def test_on_a_gpu_that_is_not_there_they_have_the_right_shapes():
    with FakeTensorMode():
        x = torch.empty(3, 128, dtype=BF16, device="cuda")
        scale = torch.empty(16, 1, dtype=BF16, device="cuda")
        y = TritonInt8().linear(
            x,
            (torch.empty(16, 128, dtype=torch.int8, device="cuda"), scale),
            None,
            case_of(INT8["int8-weight-only"], 16, 128, BF16),
        )
        assert (y.shape, y.dtype, y.device.type) == ((3, 16), BF16, "cuda")
        words = torch.empty(16, 16, dtype=torch.int32, device="cuda")
        y = TritonInt4().linear(x, (words, scale), None, case_of(INT4["int4-symmetric-128"], 16, 128, BF16))
        assert (y.shape, y.dtype, y.device.type) == ((3, 16), BF16, "cuda")


@pytest.mark.parametrize(
    ("kernel", "format_", "k", "dtype", "words"),
    [
        (
            TritonInt8(),
            FORMATS["int8-weight-only"],
            64,
            torch.float32,
            "bfloat16 and float16 activations, and these are torch.float32",
        ),
        (TritonInt8(), FORMATS["int8-dynamic"], 64, BF16, "does not quantize activations"),
        (TritonInt8(), FORMATS["int4-symmetric"], 64, BF16, "symmetric 8-bit weights"),
        (
            TritonInt8(),
            LinearFormat(IntGrid(8, 40)),
            80,
            BF16,
            "groups of a multiple of 16 inputs, or one a row, and these are of 40",
        ),
        (TritonInt4(), FORMATS["int4"], 64, torch.float32, "bfloat16 and float16 activations"),
        (TritonInt4(), FORMATS["int8-dynamic-int4"], 64, BF16, "does not quantize activations"),
        (TritonInt4(), FORMATS["int5"], 64, BF16, "weights of 2 to 4 bits"),
        (TritonInt4(), LinearFormat(IntGrid(4, 16)), 64, BF16, "groups of a multiple of 32 inputs, and these are of 16"),
        (TritonInt4(), FORMATS["int4-per-channel"], 48, BF16, "multiples of 32 inputs, and K is 48"),
        (TritonInt4(), FORMATS["int4"], 48, BF16, "cannot be cut into groups"),
    ],
)
def test_they_name_the_limit(kernel, format_, k, dtype, words):
    answer = kernel.supports(case_of(format_, 16, k, dtype, "cuda"))
    assert not answer.ok
    assert words in answer.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_without_a_gpu_they_say_so():
    for kernel, name in ((TritonInt8(), "int8-weight-only"), (TritonInt4(), "int4-float-128")):
        assert "CUDA" in kernel.supports(case_of(ALL[name][1], 16, 128, BF16, "cuda")).reason
        assert "the weight is on cpu" in kernel.supports(case_of(ALL[name][1], 16, 128, BF16)).reason
