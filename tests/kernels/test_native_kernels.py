"""The native library as kernels of the table: which linear is whose, what each refuses and why, and the way back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from native_cases import EPS, INPUT_SCALE, KINDS, Linear, canonical, make_float_linear, make_linear, make_x

from llmq.numerics.grid import ActivationGrid, FloatGrid, IntGrid, LinearFormat
from llmq.numerics.weight import QuantizedWeight
from llmq.ops import native
from llmq.ops.cpu import NATIVE_KERNELS, linear_struct
from llmq.ops.native_abi import SCALE_BF16, SCALE_F32
from llmq.ops.schema import Case
from llmq.ops.table import kernel_named

pytestmark = pytest.mark.usefixtures("native_library")

BF16, F32 = torch.bfloat16, torch.float32


def case_of(linear: Linear, dtype: torch.dtype = BF16) -> Case:
    return Case(canonical(linear)[0], *linear.numbers[:2], dtype, "cpu")


def f32(number: float) -> float:
    return torch.tensor(number).item()


def supporting(case: Case) -> list[str]:
    return [kernel.name for kernel in NATIVE_KERNELS if kernel.supports(case).ok]


@pytest.fixture
def fast_isa() -> None:
    answer = NATIVE_KERNELS[0].available()
    if not answer.ok:
        pytest.skip(answer.reason)


@pytest.mark.usefixtures("fast_isa")
def test_every_kind_has_its_kernel_and_comes_back_from_it():
    names = {"int8": "native-int8", "int8 x int8": "native-int8-dynamic", "int8 x static": "native-int8-dynamic"}
    for kind in KINDS:
        expected = names.get(kind, "native-int8-dynamic-int4" if " x " in kind else "native-int4")
        for scale in (SCALE_BF16, SCALE_F32):
            linear = make_linear(kind, 50, 96, 32, scale)
            case = case_of(linear)
            assert supporting(case) == [expected], kind
            kernel, weight = kernel_named(expected), canonical(linear)[1]
            stored = kernel.prepack(weight)
            assert torch.equal(stored[0], linear.pack(native.kernels()))
            assert [tensor.tolist() for tensor in stored[1:]] == ([[f32(INPUT_SCALE)]] if "static" in kind else [])
            back = kernel.unpack(stored, case)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(weight.tensors, back.tensors, strict=True))
            struct = linear_struct(case, stored)
            assert native.format_numbers(struct) == linear.numbers
            assert struct.input_scale == (f32(INPUT_SCALE) if "static" in kind else 0)
    assert supporting(case_of(make_float_linear(BF16, 5, 9))) == ["native-bf16"]
    assert supporting(case_of(make_float_linear(F32, 5, 9), F32)) == ["native-fp32"]


@pytest.mark.usefixtures("fast_isa")
def test_fp16_scales_come_back_as_such():
    grid = IntGrid(8, 32, scale_dtype="float16")
    linear = make_linear("int8", 20, 96, 32, SCALE_F32)
    weight = QuantizedWeight.from_codes(grid, linear.codes, linear.scale.half())
    kernel = kernel_named("native-int8")
    back = kernel.unpack(kernel.prepack(weight), Case(LinearFormat(grid), 20, 96, BF16, "cpu"))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(weight.tensors, back.tensors, strict=True))


SYMMETRIC, ASYMMETRIC = ActivationGrid(symmetric=True), ActivationGrid(symmetric=False)
INT8, INT4 = IntGrid(8, 32), IntGrid(4, 32)
REFUSED = [
    ("native-int8-dynamic", LinearFormat(INT8), BF16, "symmetric int8 activations"),
    ("native-int8-dynamic", LinearFormat(INT8, ASYMMETRIC), BF16, "symmetric int8 activations"),
    ("native-int8-dynamic", LinearFormat(INT4, SYMMETRIC), BF16, "symmetric 8-bit weights"),
    ("native-int8-dynamic", LinearFormat(replace(INT8, symmetric=False, zero_point="int"), SYMMETRIC), BF16, "symmetric 8-bit"),
    (
        "native-int8-dynamic",
        LinearFormat(IntGrid(8, 4), SYMMETRIC),
        BF16,
        "multiple of 8 inputs, or one a row, and these are of 4",
    ),
    ("native-int8-dynamic", LinearFormat(INT8, ActivationGrid(eps=1e-45)), BF16, "an eps that is a normal positive fp32 number"),
    ("native-int8-dynamic", LinearFormat(INT8, SYMMETRIC), torch.float64, "float64"),
    ("native-int8-dynamic-int4", LinearFormat(INT4), BF16, "it takes int8 activations"),
    ("native-int8-dynamic-int4", LinearFormat(IntGrid(5, 32), SYMMETRIC), BF16, "weights of 2 to 4 bits"),
    ("native-int8-dynamic-int4", LinearFormat(INT4, ActivationGrid(symmetric=False, eps=0.0)), BF16, "an eps that is"),
    (
        "native-int8-dynamic-int4",
        LinearFormat(replace(INT4, symmetric=False, zero_point="float"), SYMMETRIC),
        BF16,
        "integer zero point or none",
    ),
    ("native-int8", LinearFormat(INT8), F32, "bfloat16 activations, and these are torch.float32"),
    ("native-int8", LinearFormat(INT8), torch.float16, "bfloat16 activations, and these are torch.float16"),
    ("native-int8", LinearFormat(INT8, SYMMETRIC), BF16, "the activations are quantized"),
    ("native-int8", LinearFormat(INT4), BF16, "symmetric 8-bit weights"),
    ("native-int4", LinearFormat(INT4), F32, "bfloat16 activations"),
    ("native-int4", LinearFormat(IntGrid(4, 12)), BF16, "these are of 12"),
    ("native-int4", LinearFormat(FloatGrid("bfloat16")), BF16, "weights of 2 to 4 bits"),
    ("native-bf16", LinearFormat(FloatGrid("bfloat16")), F32, "weights and activations"),
    ("native-bf16", LinearFormat(FloatGrid("float32")), BF16, "weights and activations"),
    ("native-bf16", LinearFormat(INT4), BF16, "the weight is quantized"),
    ("native-fp32", LinearFormat(FloatGrid("float16")), torch.float16, "weights and activations"),
]


@pytest.mark.usefixtures("fast_isa")
@pytest.mark.parametrize(
    ("name", "format_", "dtype", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_says_what_it_cannot_do(name, format_, dtype, words):
    answer = kernel_named(name).supports(Case(format_, 16, 96, dtype, "cpu"))
    assert not answer.ok
    assert words in answer.reason


@pytest.mark.usefixtures("fast_isa")
def test_says_where_it_cannot_run_and_how_long_a_row_may_be():
    case = Case(LinearFormat(IntGrid(8), SYMMETRIC), 8, 131072, F32, "cpu")
    kernel = kernel_named("native-int8-dynamic")
    assert kernel.supports(case).ok
    assert kernel.supports(replace(case, k=131073)).reason == "it takes up to 131072 inputs, and K is 131073"
    assert kernel.supports(replace(case, device="cuda")).reason == "it is for CPUs, and the weight is on cuda"


def test_portable_code_is_not_offered(monkeypatch):
    facts = native.Available("here", "generic", ("generic",), "openmp")
    monkeypatch.setattr(native, "status", lambda: facts)
    for kernel in NATIVE_KERNELS:
        assert "only portable code" in kernel.available().reason


@pytest.mark.usefixtures("fast_isa")
def test_every_row_comes_from_the_native_operator():
    """The kernel's own `linear` is the library's, for every number of rows."""
    linear = make_linear("int4 + float", 40, 96, 32)
    kernel, weight = kernel_named("native-int4"), canonical(linear)[1]
    packed = kernel.prepack(weight)
    x = make_x(7, 96, BF16)
    y = kernel.linear(x, packed, linear.bias.bfloat16(), case_of(linear))
    expected = native.kernels().linear(x, packed[0], linear.bias.bfloat16(), linear.numbers, EPS)
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
