"""The int8 x int4 kernel in Triton's interpreter, or on a GPU: packing, products against the exact result, launches."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton_compile import SHARED_MEMORY, compiled

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from op_cases import FORMATS, INT8, INT8_ASYMMETRIC, INT8_STATIC, assert_kernel_close, case_of, make_weight, make_x

from llmq.numerics.grid import IntGrid, LinearFormat
from llmq.ops import triton_support
from llmq.ops.triton_int8 import TritonInt8DynamicInt4, chunk_sums, pack_pairs, unpack_pairs

H200 = (132, 227 << 10)
KERNEL = TritonInt8DynamicInt4()
ZERO = {"symmetric": False, "zero_point": "int"}
VARIANTS = {
    "groups of 32": (LinearFormat(IntGrid(4, 32, scale_dtype="bfloat16"), INT8_ASYMMETRIC), 50, 352),
    "groups of 64": (LinearFormat(IntGrid(4, 64), INT8_ASYMMETRIC), 16, 448),
    "groups of 96": (LinearFormat(IntGrid(4, 96, scale_dtype="float16"), INT8_ASYMMETRIC), 33, 288),
    "groups of 128, zero points": (LinearFormat(IntGrid(4, 128, **ZERO), INT8_ASYMMETRIC), 50, 384),
    "groups of 256": (LinearFormat(IntGrid(3, 256), INT8_ASYMMETRIC), 48, 768),
    "one group a row, zero points": (LinearFormat(IntGrid(2, None, **ZERO), INT8_ASYMMETRIC), 1, 1120),
    "symmetric activations": (LinearFormat(IntGrid(4, 32), INT8), 70, 96),
    "symmetric activations, zero points": (LinearFormat(IntGrid(4, 64, **ZERO), INT8), 50, 192),
    "static": (FORMATS["int4-static"], 50, 320),
    "static, no zero points": (LinearFormat(IntGrid(3, 32), INT8_STATIC), 50, 320),
}


def product(x, packed, bias, case, device):
    given = tuple(tensor.to(device) for tensor in packed)
    return KERNEL.linear(x.to(device), given, None if bias is None else bias.to(device), case).cpu()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("m", "dtype"), [(0, torch.bfloat16), (1, torch.bfloat16), (3, torch.float16), (16, torch.float32)])
def test_few_rows_are_close_to_the_exact_result(triton_device, variant, m, dtype):
    check(triton_device, variant, m, dtype)


@pytest.mark.parametrize("variant", ["groups of 32", "groups of 128, zero points", "static"])
@pytest.mark.parametrize("m", [17, 40, 65])
def test_many_rows_are_close_to_the_exact_result(triton_device, variant, m):
    check(triton_device, variant, m, torch.bfloat16)


def check(device, variant, m, dtype):
    format_, n, k = VARIANTS[variant]
    weight, x, case = make_weight(format_, n, k, seed=m), make_x(m, k, dtype), case_of(format_, n, k, dtype, "cuda")
    assert KERNEL.fits(case).ok
    packed = KERNEL.prepack(weight)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    for term in (None, bias):
        assert_kernel_close(product(x, packed, term, case, device), x, weight, term, case, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unpacks_bit_for_bit(variant):
    format_, n, k = VARIANTS[variant]
    weight = make_weight(format_, n, k)
    back = KERNEL.unpack(KERNEL.prepack(weight), case_of(format_, n, k, torch.bfloat16, "cuda"))
    for ours, theirs in zip(weight.tensors, back.tensors, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_nibbles_lie_as_the_kernel_reads_them():
    codes = torch.randint(0, 16, (20, 96), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack_pairs(codes, 32)
    assert packed.shape == (2, 2, 16, 32)
    assert torch.equal(unpack_pairs(packed, 20, 96), codes)
    signed = packed[1, 1, 3].to(torch.int16)  # row 19, inputs 64 to 95 in the low nibbles, padding in the high ones
    assert torch.equal((signed & 15 ^ 8), codes[19, 64:].to(torch.int16))
    assert not bool((signed >> 4).any())
    assert torch.equal((packed[0, 0, 5] >> 4 ^ 8), codes[5, 32:64])
    sums = chunk_sums(codes, None, 32)
    assert torch.equal(sums[2], (codes[:, 64:].int() - 8).sum(dim=1).short())


def test_zero_points_of_both_sides_are_exact(triton_device):
    """Inputs near one end: codes near 127 and a zero point near 127, whose products cancel but for the last digits."""
    format_, n, k = VARIANTS["groups of 128, zero points"]
    weight, case = make_weight(format_, n, k), case_of(format_, n, k, torch.float32, "cuda")
    x = -(torch.rand(4, k, generator=torch.Generator().manual_seed(3)) ** 8)
    x[1] = -x[1]
    x[2], x[3] = -1.0, 1.0
    assert_kernel_close(product(x, KERNEL.prepack(weight), None, case, triton_device), x, weight, None, case, "ends")


def test_launches_agree_and_twice_is_once(triton_device):
    kernels = triton_support.load("int8_int4")
    format_, n, k = VARIANTS["groups of 96"]
    weight, case = make_weight(format_, n, k), case_of(format_, n, k, torch.float32, "cuda")
    packed, scale, sums = (tensor.to(triton_device) for tensor in KERNEL.prepack(weight))
    given = kernels.Weight(packed, scale, None, sums)
    bias = torch.randn(n)
    plain = kernels.Launch(16, 32, 1, 1, 4, 2)
    for m in (2, 20):
        x = make_x(m, k, torch.float32)
        for how in (plain, replace(plain, spans=2), replace(plain, block_m=32, block_n=16, group_m=2)):
            y, again = (
                kernels.linear(x.to(triton_device), given, None, bias.to(triton_device), 1e-5, how).cpu() for _ in range(2)
            )
            assert torch.equal(y, again)
            assert_kernel_close(y, x, weight, bias, case, str(how))


def test_what_is_not_finite_stays_in_its_row_and_is_not_hidden(triton_device):
    for variant in ("groups of 32", "static"):
        format_, n, k = VARIANTS[variant]
        weight, case = make_weight(format_, n, k), case_of(format_, n, k, torch.bfloat16, "cuda")
        x = make_x(5, k, torch.bfloat16)
        poisoned = x.clone()
        poisoned[1, 7], poisoned[3, k - 1] = torch.inf, torch.nan
        y = product(poisoned, KERNEL.prepack(weight), None, case, triton_device)
        assert bool(y[[1, 3]].isnan().all())
        kept = [0, 2, 4]
        assert_kernel_close(y[kept], x[kept], weight, None, case, variant)


def test_strides_and_addresses_do_not_matter(triton_device):
    format_, n, k = VARIANTS["groups of 32"]
    packed, case = KERNEL.prepack(make_weight(format_, n, k)), case_of(format_, n, k, torch.bfloat16, "cuda")
    x = make_x(3, k, torch.bfloat16)
    expected = product(x, packed, None, case, triton_device)
    wide = torch.full((3, k + 5), 9.0, dtype=x.dtype)
    wide[:, 5:] = x
    for view in (x.new_empty(3 * k + 3)[3:].view(3, k).copy_(x), wide[:, 5:], x.T.contiguous().T):
        assert torch.equal(product(view, packed, None, case, triton_device), expected)


def test_the_operator_is_one_for_torch(triton_device):
    format_, n, k = VARIANTS["groups of 128, zero points"]
    packed, scale, zero, sums = (tensor.to(triton_device) for tensor in KERNEL.prepack(make_weight(format_, n, k)))
    x = make_x(3, k, torch.bfloat16).to(triton_device)
    arguments = (x, [packed, scale], zero, sums, None, None, 1e-5)
    torch.library.opcheck(torch.ops.llmq.triton_int8_int4_linear.default, arguments)


@pytest.mark.parametrize(
    ("format_", "device", "words"),
    [
        (FORMATS["int8-dynamic-int4"], "cpu", "for CUDA GPUs, and the weight is on cpu"),
        (FORMATS["int4-integer-zero"], "cuda", "int8 activations"),
        (FORMATS["int8-dynamic"], "cuda", "weights of 2 to 4 bits"),
        (LinearFormat(IntGrid(4, 16), INT8), "cuda", "groups of a multiple of 32 inputs, and these have 16"),
        (LinearFormat(IntGrid(4, None), INT8), "cuda", "and these have 240"),
        (LinearFormat(IntGrid(4, 32), INT8), "cuda", "cannot be cut into groups of 32"),
    ],
)
def test_it_names_the_limit(format_, device, words):
    answer = KERNEL.supports(case_of(format_, 16, 240, torch.bfloat16, device))
    assert not answer.ok
    assert words in answer.reason


def test_launches_fill_the_gpu_and_fit_it(triton_device):
    launch = triton_support.load("int8_int4").launch
    for chunk in (32, 64, 128):
        for n, k in ((4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (50, 128)):
            pairs = -(-k // (2 * chunk))
            for rows in (1, 3, 16, 17, 40, 100, 2048):
                for multiprocessors, shared in (H200, (108, SHARED_MEMORY[80]), (128, SHARED_MEMORY[89])):
                    how = launch(rows, n, (pairs, chunk), multiprocessors, shared)
                    assert how.shared_bytes(chunk) <= shared
                    assert (how.spans - 1) * how.span(pairs) < pairs <= how.spans * how.span(pairs)
                    assert how.block_m >= min(rows, 16)
                    assert how.block_n % 16 == 0
    how = launch(1, 4096, (16, 128), *H200)
    assert how.spans * 4096 // how.block_n >= 2 * 132
    assert launch(2048, 4096, (16, 128), *H200).block_m == 128
    assert launch(2048, 4096, (16, 128), 128, SHARED_MEMORY[89]).block_m == 64


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus(tmp_path, capability):
    """The compiler refuses what the interpreter takes. Weights travel asynchronously to int8 tensor cores."""
    pytest.importorskip("triton")
    program = f"""
import torch
from llmq.ops.triton_support import load
int4 = load("int8_int4")
def launched(m, n, k, group, sums, zero, dtype=torch.bfloat16):
    chunk = min(group, 128)
    pairs = -(-k // (2 * chunk))
    packed = torch.empty(-(-n // 16), pairs, 16, chunk, dtype=torch.uint8)
    zeros = torch.empty(k // group, n, dtype=torch.uint8) if zero else None
    weight = int4.Weight(packed, torch.empty(k // group, n, dtype=dtype), zeros, sums and torch.empty(k // chunk, n).short())
    how = int4.launch(m, n, (pairs, chunk), 132, {SHARED_MEMORY[capability]})
    int4.linear(torch.empty(m, k, dtype=dtype), weight, None if sums else torch.ones(1), None, 1e-5, how)
SUMS, NONE = True, None
if {capability} == 80:
    launched(1, 4096, 4096, 128, SUMS, False)
    launched(2048, 11008, 4096, 128, SUMS, False)
else:
    launched(16, 4096, 11008, 32, SUMS, False)
    launched(2048, 4096, 4096, 32, SUMS, False)
    launched(40, 50, 1088, 64, NONE, True, torch.float16)
"""
    found = compiled(program, capability, tmp_path)
    products = [kernel for kernel in found if kernel.kernel == "_int4_product"]
    assert len(products) == (2 if capability == 80 else 3)
    for kernel in found:
        assert kernel.spilled <= 16
        assert kernel.shared <= SHARED_MEMORY[capability]
    for kernel in products:
        assert kernel.count(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x(10|8)")
        assert kernel.count(r"mma\S*\.s8\.s8")
    assert (capability < 90) or any(kernel.count(r"wgmma\.mma_async\S*\.s32\.s8\.s8") for kernel in products)
