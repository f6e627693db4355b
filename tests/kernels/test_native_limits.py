"""The edges of the native linears: sizes, packing and back, and every refusal with its sentence."""

from __future__ import annotations

import ctypes

import pytest
import torch
from native_cases import EPS, KINDS, Linear, canonical, instruction_sets, make_float_linear, make_linear, make_x

from llmq.errors import KernelError
from llmq.ops import native, native_abi
from llmq.ops.native_abi import SCALE_BF16, SCALE_F32, LlmqLinear

pytestmark = pytest.mark.usefixtures("native_library")

BF16, F32 = torch.bfloat16, torch.float32
NULL, SHAPE, ISA, WRONG_EPS, THREADS, FORMAT = 1, 2, 3, 4, 5, 6
GOOD = {"n": 3, "k": 64, "group": 32, "weight": 2, "zero": 0, "scale": 1, "activation": 1, "eps": EPS}
"""int4 weights by group and symmetric int8 activations."""
FLOATS = {"weight": 3, "zero": 0, "scale": 0, "activation": 0}


@pytest.fixture(params=instruction_sets())
def kernels(request) -> native.Kernels:
    return native.kernels(request.param)


def every_linear(n: int, k: int, group: int) -> list[Linear]:
    integers = [make_linear(kind, n, k, group, scale) for kind in KINDS for scale in (SCALE_BF16, SCALE_F32)]
    return [*integers, make_float_linear(BF16, n, k), make_float_linear(F32, n, k)]


def test_unpacks_bit_for_bit(kernels):
    for n, k, group in ((1, 8, 8), (5, 100, 100), (17, 1, 1), (40, 96, 32), (16, 512, 256), (33, 528, 264)):
        for linear in every_linear(n, k, group):
            codes = torch.full_like(linear.codes, 99)
            scale, zero = (None if one is None else torch.full_like(one, 99) for one in (linear.scale, linear.zero))
            kernels.unpack(linear.pack(kernels), codes, scale, zero, linear.struct)
            for ours, theirs in ((codes, linear.codes), (scale, linear.scale), (zero, linear.zero)):
                assert (ours is None and theirs is None) or torch.equal(ours, theirs), linear.numbers


def test_packs_weights_of_any_strides(kernels):
    for linear in every_linear(24, 40, 8):
        strided = Linear(
            linear.numbers,
            linear.codes.T.contiguous().T,
            None if linear.scale is None else torch.stack([linear.scale] * 2, 2)[..., 0],
            linear.zero,
            linear.bias,
        )
        assert torch.equal(strided.pack(kernels), linear.pack(kernels))


def panel_bytes(linear: Linear) -> int:
    """By hand: a header of 16 scales and 16 zero points in whole 32 bytes a group, and the codes."""
    _, k, group, weight, zero, scale, _ = linear.numbers
    number = {native_abi.SCALE_NONE: 0, SCALE_F32: 4, SCALE_BF16: 2}[scale]
    header = 16 * (number + (0, 1, number)[zero])
    bits = {native_abi.WEIGHT_INT4: 4, native_abi.WEIGHT_INT8: 8, native_abi.WEIGHT_BF16: 16, native_abi.WEIGHT_F32: 32}[weight]
    inputs = -(-k // 8) * 8
    return k // group * (-(-header // 32) * 32) + inputs * 16 * bits // 8


def test_sizes(kernels):
    for n, k, group in ((1, 8, 8), (17, 100, 100), (40, 96, 32), (256, 1024, 128)):
        for linear in every_linear(n, k, group):
            assert linear.pack(kernels).numel() == -(-n // 16) * panel_bytes(linear), linear.numbers
            sizes = [workspace_bytes(kernels, linear, m) for m in (0, 1, 2, 512, 513, 100_000)]
            assert sizes == sorted(sizes)
            assert sizes[3] == sizes[5]  # rows are taken 512 at a time


def workspace_bytes(kernels: native.Kernels, linear: Linear, m: int) -> int:
    size = ctypes.c_int64()
    kernels.call("llmq_linear_workspace_bytes", ctypes.byref(linear.struct), m, ctypes.byref(size))
    return size.value


def test_int4_keeps_its_bits_per_weight_when_packed(kernels):
    """Nothing but whole panels and whole 32 bytes of a header is added to what is on disk."""
    linear = make_linear("int4", 64, 4096, 128, SCALE_BF16)
    assert linear.pack(kernels).numel() * 8 == canonical(linear)[1].bits_per_weight * 64 * 4096


class Raw:
    """The C functions, with arguments that are right unless a test says otherwise; they return the status."""

    def __init__(self, isa: int | None = None) -> None:
        self.kernels = native.kernels()
        self.isa = self.kernels.isa if isa is None else isa
        self.y = torch.full((4, 3), 7.0)
        self.buffers = {name: torch.zeros(1 << 16, dtype=torch.uint8) for name in ("x", "packed", "workspace", "weight")}
        self.numbers = torch.ones(3, 8)

    def struct(self, **changes: float) -> LlmqLinear:
        return LlmqLinear(**{**GOOD, "packed": self.buffers["packed"].data_ptr(), **changes})

    def call(self, symbol: str, *arguments: object) -> int:
        return getattr(self.kernels.library, symbol)(self.isa, *arguments)

    def at(self, name: str, missing: str | None) -> int | None:
        return None if name == missing else self.buffers[name].data_ptr()

    def linear(
        self, *, m: int = 1, stride: int = 64, dtype: int = 0, threads: int = 1, missing: str | None = None, **changes
    ) -> int:
        struct = self.struct(**({"packed": None} if missing == "packed" else {}), **changes)
        y = None if missing == "y" else self.y.data_ptr()
        reference = None if missing == "linear" else ctypes.byref(struct)
        x, workspace = self.at("x", missing), self.at("workspace", missing)
        return self.call("llmq_linear", reference, x, y, workspace, m, stride, dtype, threads)

    def pack(self, *, threads: int = 1, missing: str | None = None, back: bool = False, **changes) -> int:
        struct = self.struct(**changes)
        reference = None if missing == "linear" else ctypes.byref(struct)
        weight, packed = self.at("weight", missing), self.at("packed", missing)
        scale, zero = (None if name == missing else self.numbers.data_ptr() for name in ("scale", "zero"))
        if back:
            return self.call("llmq_linear_unpack", reference, packed, weight, scale, zero, threads)
        return self.call("llmq_linear_pack", reference, weight, scale, zero, packed, threads)

    def sizes(self, *, m: int = 1, missing: str | None = None, **changes) -> set[int]:
        struct, size = self.struct(**changes), ctypes.c_int64(-5)
        reference, out = (None if missing == name else ctypes.byref(to) for name, to in (("linear", struct), ("bytes", size)))
        packed = self.call("llmq_linear_packed_bytes", reference, out) if m == 1 else 0
        workspace = self.call("llmq_linear_workspace_bytes", reference, m, out)
        assert size.value == -5 or not (packed and workspace)
        return {packed, workspace} - {0}


WRONG_FORMATS = [
    ({"n": 0}, SHAPE),
    ({"k": 0}, SHAPE),
    ({"k": -64}, SHAPE),
    ({"k": 131104}, SHAPE),
    ({"group": 0}, SHAPE),
    ({"group": 48}, SHAPE),  # does not divide K
    ({"group": 4}, SHAPE),  # is no multiple of 8
    ({"weight": 0}, FORMAT),
    ({"weight": 5}, FORMAT),
    ({"zero": -1}, FORMAT),
    ({"zero": 3}, FORMAT),
    ({"zero": 2}, FORMAT),  # floating zero points and int8 activations
    ({"scale": 0}, FORMAT),
    ({"scale": 3}, FORMAT),
    ({"activation": -1}, FORMAT),
    ({"activation": 4}, FORMAT),
    ({"weight": 1, "zero": 1}, FORMAT),  # int8 weights have no zero points
    ({"weight": 1, "activation": 2}, FORMAT),
    ({**FLOATS, "scale": 1}, FORMAT),
    ({**FLOATS, "zero": 1}, FORMAT),
    ({**FLOATS, "activation": 1}, FORMAT),
    ({"zero": 2, "activation": 3}, FORMAT),
    *(({"activation": 3, "input_scale": scale}, WRONG_EPS) for scale in (0.0, -1.0, 1e-40, float("inf"), float("nan"))),
    ({"eps": 0.0}, WRONG_EPS),
    ({"eps": -1.0}, WRONG_EPS),
    ({"eps": 1e-40}, WRONG_EPS),
    ({"eps": float("inf")}, WRONG_EPS),
    ({"eps": float("nan")}, WRONG_EPS),
]


def test_refuses_formats_that_are_none():
    raw = Raw()
    assert raw.linear() == raw.pack() == raw.pack(back=True) == 0
    raw.y[:] = 7
    for changes, status in WRONG_FORMATS:
        assert raw.linear(**changes) == status, changes
        assert raw.pack(**changes) == raw.pack(back=True, **changes) == status, changes
        assert raw.sizes(**changes) == {status}, changes
    assert raw.linear(activation=0, eps=float("nan")) == 0  # nobody reads it
    assert raw.linear(activation=3, input_scale=1.0, eps=0.0) == 0
    assert raw.linear(group=64) == raw.linear(k=60, group=60) == 0  # one group a row may have any length


def test_refuses_arguments_that_are_wrong():
    raw = Raw()
    for changes, status in (
        *(({"missing": name}, NULL) for name in ("linear", "x", "y", "workspace", "packed")),
        ({"m": -1}, SHAPE),
        ({"stride": 63}, SHAPE),
        ({"dtype": 2}, FORMAT),
        ({"dtype": -1}, FORMAT),
        ({"threads": 0}, THREADS),
        ({"threads": -3}, THREADS),
    ):
        assert raw.linear(**changes) == status, changes
    assert torch.equal(raw.y, torch.full((4, 3), 7.0))  # whatever refuses has written nothing
    assert raw.linear(m=0, missing="x") == raw.linear(m=0, missing="y") == 0
    for back in (False, True):
        for missing in ("linear", "weight", "packed", "scale"):
            assert raw.pack(back=back, missing=missing) == NULL, missing
        assert raw.pack(back=back, missing="zero", zero=1) == NULL
        assert raw.pack(back=back, missing="zero") == 0
        assert raw.pack(back=back, missing="scale", **FLOATS) == 0
        assert raw.pack(back=back, threads=0) == THREADS
    assert raw.sizes(missing="linear") == raw.sizes(missing="bytes") == {NULL}
    assert raw.sizes(m=-1) == {SHAPE}


def test_refuses_instruction_sets_that_are_none():
    count = native.kernels().library.llmq_isa_count()
    for isa in (-1, count):
        raw = Raw(isa)
        assert raw.linear() == raw.pack() == raw.pack(back=True) == ISA
        assert raw.sizes() == {ISA}
        assert raw.kernels.library.llmq_isa_name(isa) is None
        assert raw.kernels.library.llmq_linear_layout(isa, 1) is None
        assert raw.kernels.library.llmq_isa_available(isa) == 0
    assert native.kernels().library.llmq_linear_layout(0, 0) is None
    assert native.kernels().library.llmq_linear_layout(0, 5) is None


def test_quantizing_refuses_too():
    raw, q, scale = Raw(), torch.zeros(64, dtype=torch.int8), torch.zeros(4)

    def quantize(*, m=1, k=4, stride=4, dtype=0, eps=EPS, threads=1, missing=None):
        at = {"x": raw.buffers["x"].data_ptr(), "q": q.data_ptr(), "scale": scale.data_ptr()}
        x, codes, scales = (None if name == missing else address for name, address in at.items())
        return raw.call("llmq_quantize_per_token", x, codes, scales, m, k, stride, dtype, eps, threads)

    assert quantize() == quantize(m=0, missing="x") == 0
    for changes, status in (
        *(({"missing": name}, NULL) for name in ("x", "q", "scale")),
        *(({name: value}, SHAPE) for name, value in (("m", -1), ("k", 0), ("k", 131073), ("stride", 3))),
        *(({"eps": eps}, WRONG_EPS) for eps in (0.0, 1e-40, float("inf"), float("nan"))),
        ({"dtype": 7}, FORMAT),
        ({"threads": 0}, THREADS),
    ):
        assert quantize(**changes) == status, changes


def test_each_status_has_its_sentence():
    words = {
        0: "done",
        NULL: "NULL",
        SHAPE: "1 <= k <= 131072",
        ISA: "instruction set",
        WRONG_EPS: "eps, or the scale",
        THREADS: "n_threads",
    }
    message = native.kernels().library.llmq_status_message
    said = [message(status).decode() for status in range(10)]
    assert all(word in said[status] for status, word in {**words, FORMAT: "do not go together"}.items())
    assert len({*said, message(99), message(-1)}) == 11  # each its own, and one for what is none


def test_python_refuses_what_does_not_belong_together(kernels):
    linear, x = make_linear("int4 x int8", 20, 64, 32), make_x(2, 64, F32)
    packed = linear.pack(kernels)
    numbers, bias = linear.numbers, linear.bias
    for arguments, message in (
        ((x.double(), packed, bias, numbers, EPS), "take x .M, K. of float32"),
        ((x[0], packed, bias, numbers, EPS), "take x .M, K. of float32"),
        ((x[:, :-1], packed, bias, numbers, EPS), r"x must have K = 64 columns, got \[2, 63\]"),
        ((x, packed[:-1], bias, numbers, EPS), r"a weight \[20, 64\] packed for"),
        ((x, packed.view(torch.int8), bias, numbers, EPS), r"contiguous bytes, got .* of torch\.int8"),
        ((x, torch.stack([packed] * 2, 1)[:, 0], bias, numbers, EPS), "contiguous bytes"),
        ((x, packed, bias[:-1], numbers, EPS), "bias must be 20 floats"),
        ((x, packed, bias.int(), numbers, EPS), "bias must be 20 floats"),
        ((x, packed, bias, numbers, 0.0), "eps, or the scale of static activations, must be a positive, finite, normal float"),
        ((x, packed, bias, (*numbers[:6], 3), 0.0, torch.zeros(1)), "the scale of static activations, must be a positive"),
        ((x, packed, bias, (*numbers[:2], 48, *numbers[3:]), EPS), "groups that divide k and are multiples of 8"),
        ((x, packed, bias, (*numbers[:6], 9), EPS), "activation or dtype is no number of this library"),
    ):
        with pytest.raises(KernelError, match=message):
            kernels.linear(*arguments)
    with pytest.raises(KernelError, match=r"a weight \[20, 64\] packed for"):
        kernels.unpack(packed[1:], linear.codes, linear.scale, None, linear.struct)
    with pytest.raises(KernelError, match=r"take x \[M, K\] of float32"):
        kernels.quantize(x.long(), EPS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_operators_pass_opcheck():
    x = make_x(3, 64, F32)
    torch.library.opcheck(torch.ops.llmq.quantize_per_token.default, (x, EPS))
    for kind, dtype in (("int4 - int x uint8", BF16), ("int4 - int x uint8", torch.float16), ("int8 x static", BF16)):
        linear = make_linear(kind, 20, 64, 32)
        bias = linear.bias if dtype == BF16 else None
        arguments = (x.clamp(-9, 9).to(dtype), linear.pack(native.kernels()), bias, linear.numbers, EPS, linear.input_scale)
        torch.library.opcheck(torch.ops.llmq.native_linear.default, arguments)
