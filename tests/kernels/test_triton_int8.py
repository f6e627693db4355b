"""The int8 x int8 kernels in Triton's interpreter, or on a GPU: codes bit for bit, exact products, launches."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton_compile import SHARED_MEMORY, compiled

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from op_cases import DTYPES, FORMATS, INT8, INT8_ASYMMETRIC, INT8_STATIC, assert_kernel_close, case_of, make_weight, make_x

from llmq.ops import triton_support
from llmq.ops.reference import quantize_activation
from llmq.ops.triton_int8 import TritonInt8Dynamic

H200 = (132, 227 << 10)


@pytest.fixture
def kernels(triton_device):
    return triton_support.load("int8")


def adversarial(k, dtype):
    """Rows where codes are easily wrong by one: ties, ends of the grid, one sign, nothing, hardly anything, next to too much."""
    x = make_x(12, k, dtype).float()
    x[3] = 2.5
    x[4] = -3.25
    x[5] = torch.arange(k) % 255 / 2 - 63.5  # scale 1/2: halves are ties
    x[6] = x[6].abs()
    x[7] = -x[7].abs()
    x[8] = torch.tensor([127.0, -127.0] + [0.5, -0.5, 1.5, 2.5] * k)[:k]  # scale 1
    x[9] *= 2.0**-20  # below eps
    x[10] *= 2.0 ** (100 if dtype != torch.float16 else 12)
    x[11, 1:] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grid", "k"), [(INT8, 96), (INT8_ASYMMETRIC, 96), (INT8_STATIC, 96), (INT8, 4099), (INT8_ASYMMETRIC, 4099)]
)
def test_codes_equal_the_references_bit_for_bit(kernels, triton_device, grid, k, dtype):
    x = adversarial(k, dtype)
    input_scale = torch.tensor([0.021]) if grid.static else None
    expected, scale = quantize_activation(x, grid, input_scale)
    given = None if input_scale is None else input_scale.to(triton_device)
    codes, scales, zero = kernels.quantize(x.to(triton_device), given, grid.eps, symmetric=grid.symmetric)
    assert codes.dtype == torch.int8
    assert (zero is None) == grid.symmetric
    shifted = codes.cpu().float() - (0 if zero is None else zero.cpu().float()[:, None])
    assert torch.equal(shifted, expected)
    assert torch.equal(scales.cpu(), scale[:, 0])
    assert codes.max() == 127
    assert codes.min() == (-127 if grid.symmetric else -128)


@pytest.mark.parametrize("grid", [INT8, INT8_ASYMMETRIC, INT8_STATIC])
def test_a_row_that_is_not_finite_has_no_scale_and_spoils_no_other(kernels, triton_device, grid):
    x = make_x(6, 80, torch.float32)
    for row, value in ((1, torch.nan), (3, torch.inf), (4, -torch.inf)):
        x[row, 70] = value
    input_scale = torch.tensor([0.021]) if grid.static else None
    expected, scale = quantize_activation(x, grid, input_scale)
    codes, scales, zero = kernels.quantize(x.to(triton_device), input_scale, grid.eps, symmetric=grid.symmetric)
    shifted = codes.cpu().float() - (0 if zero is None else zero.cpu().float()[:, None])
    assert scales.isnan().tolist() == [False, True, False, True, True, False]
    for row in (0, 2, 5):
        assert torch.equal(shifted[row], expected[row])
        assert scales[row].item() == scale[row].item()


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-static"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 50, 48), (1, 50, 1088), (2, 1, 336), (3, 50, 320), (7, 33, 272), (8, 16, 32)])
def test_few_rows_are_close_to_the_exact_result(triton_device, name, dtype, m, n, k):
    check(triton_device, name, dtype, (m, n, k))


@pytest.mark.parametrize(("name", "dtype"), [("int8-dynamic", torch.bfloat16), ("int8-static", torch.float16)])
@pytest.mark.parametrize(("m", "n", "k"), [(16, 50, 320), (17, 48, 144), (64, 50, 160), (65, 70, 144)])
def test_many_rows_are_close_to_the_exact_result(triton_device, name, dtype, m, n, k):
    check(triton_device, name, dtype, (m, n, k))


def check(device, name, dtype, shape):
    m, n, k = shape
    weight = make_weight(FORMATS[name], n, k, seed=m)
    x = make_x(m, k, dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    case = case_of(FORMATS[name], n, k, dtype, "cuda")
    kernel = TritonInt8Dynamic()
    packed = tuple(tensor.to(device) for tensor in kernel.prepack(weight))
    assert kernel.fits(case).ok
    for term in (None, bias):
        y = kernel.linear(x.to(device), packed, None if term is None else term.to(device), case).cpu()
        assert_kernel_close(y, x, weight, term, case, kernel.name)


def test_every_launch_gives_the_same_bits(kernels, triton_device):
    """Sums of integers have no order: not the tiles, nor the spans, nor who quantizes change a bit. And twice is once."""
    n, k = 70, 656
    weight, scale = (tensor.to(triton_device) for tensor in make_weight(FORMATS["int8-dynamic"], n, k).tensors)
    bias = torch.randn(n, dtype=torch.bfloat16).to(triton_device)
    plain = kernels.Launch(16, 32, 256, 1, 1, False, 4, 3)
    for m in (3, 37):
        x = make_x(m, k, torch.bfloat16).to(triton_device)
        first = kernels.linear(x, weight, scale, None, bias, 1e-5, plain)
        for how in (
            plain,
            replace(plain, spans=3),
            replace(plain, fused=True),
            replace(plain, fused=True, spans=2),
            replace(plain, block_k=64, group_m=2, block_n=16),
            kernels.launch(m, n, k, *H200),
        ):
            assert torch.equal(kernels.linear(x, weight, scale, None, bias, 1e-5, how), first), how


def test_strides_and_addresses_do_not_matter(triton_device):
    n, k = 48, 96
    case = case_of(FORMATS["int8-dynamic"], n, k, torch.bfloat16, "cuda")
    kernel, weight = TritonInt8Dynamic(), make_weight(FORMATS["int8-dynamic"], n, k)
    packed = tuple(tensor.to(triton_device) for tensor in kernel.prepack(weight))
    for m in (3, 17):
        x = make_x(m, k, torch.bfloat16).to(triton_device)
        expected = kernel.linear(x, packed, None, case)
        offset = x.new_empty(m * k + 3)[3:].view(m, k).copy_(x)
        wide = x.new_full((m, k + 5), 9.0)
        wide[:, 5:] = x
        every_second = x.new_full((2 * m, k), 9.0)
        every_second[::2] = x
        for view in (offset, wide[:, 5:], x.T.contiguous().T, every_second[::2]):
            assert torch.equal(kernel.linear(view, packed, None, case), expected)


@pytest.mark.parametrize("m", [3, 20])
def test_what_is_not_finite_stays_in_its_row_and_is_not_hidden(triton_device, m):
    for name in ("int8-dynamic", "int8-static"):
        case = case_of(FORMATS[name], 50, 1056, torch.float32, "cuda")  # spans are cut before and after the NaN
        kernel, weight = TritonInt8Dynamic(), make_weight(FORMATS[name], 50, 1056)
        packed = tuple(tensor.to(triton_device) for tensor in kernel.prepack(weight))
        x = make_x(m, 1056, torch.float32)
        poisoned = x.clone()
        poisoned[1, 1000] = torch.nan
        poisoned[2, 5] = torch.inf
        y = kernel.linear(poisoned.to(triton_device), packed, None, case).cpu()
        assert bool(y[[1, 2]].isnan().all())
        kept = [row for row in range(m) if row not in (1, 2)]
        assert_kernel_close(y[kept], x[kept], weight, None, case, name)


def test_the_largest_sums_are_exact(kernels, triton_device):
    """The ends of both grids: 127 * -128 * 1088 needs 25 bits, which fp32 does not have."""
    weight = torch.full((16, 1088), -128, dtype=torch.int8)
    weight[3], weight[5, ::2] = 127, 127
    x = torch.full((2, 1088), 127.0)
    x[1, 1::3] = -127.0
    x[:, 0] = 126.0  # and an odd sum
    ones = torch.ones(16, 1)
    expected = x.double() @ weight.double().T
    for fused in (False, True):
        how = kernels.Launch(2, 16, 256, 1, 2, fused, 4, 3)
        y = kernels.linear(x.to(triton_device), weight.to(triton_device), ones.to(triton_device), None, None, 1e-5, how).cpu()
        assert torch.equal(y.double(), expected.float().double())


def test_the_operator_is_one_for_torch(triton_device):
    weight, scale, static = (tensor.to(triton_device) for tensor in make_weight(FORMATS["int8-static"], 48, 96).tensors)
    x = make_x(3, 96, torch.bfloat16).to(triton_device)
    bias = torch.randn(48, dtype=torch.bfloat16).to(triton_device)
    for arguments in ((x, weight, scale, None, None, 1e-5), (x.T.contiguous().T, weight, scale, static, bias, 1e-5)):
        torch.library.opcheck(torch.ops.llmq.triton_int8_linear.default, arguments)


@pytest.mark.parametrize(
    ("name", "n", "k", "device", "words"),
    [
        ("int8-dynamic", 16, 72, "cuda", "multiples of 16, and K is 72"),
        ("int8-dynamic", 16, 64, "cpu", "for CUDA GPUs, and the weight is on cpu"),
        ("int8-dynamic-int4", 16, 64, "cuda", "symmetric int8 activations"),
        ("int8-weight-only", 16, 64, "cuda", "symmetric int8 activations"),
        ("int8-dynamic-int3", 16, 64, "cuda", "symmetric 8-bit weights with one scale a row"),
        ("int8-dynamic", 16, 1 << 18, "cuda", "overflow int32"),
    ],
)
def test_it_names_the_limit(name, n, k, device, words):
    answer = TritonInt8Dynamic().supports(case_of(FORMATS[name], n, k, torch.bfloat16, device))
    assert not answer.ok
    assert words in answer.reason


SHAPES_7B = ((4096, 4096), (11008, 4096), (4096, 11008))


def test_launches_fill_the_gpu_and_fit_it(triton_device):
    launch = triton_support.load("int8").launch
    for n, k in (*SHAPES_7B, (1024, 4096), (50, 48), (128256, 4096)):
        for rows in (1, 2, 3, 5, 16, 17, 40, 100, 512, 2048):
            for multiprocessors, shared in (H200, (108, SHARED_MEMORY[80]), (128, SHARED_MEMORY[89])):
                how = launch(rows, n, k, multiprocessors, shared)
                assert how.shared_bytes <= shared
                assert how.span(k) % how.block_k == 0
                assert (how.spans - 1) * how.span(k) < k <= how.spans * how.span(k)
                assert how.block_m >= min(rows, 16)
                assert not (how.fused and rows > 4)
    assert launch(1, 4096, 4096, *H200).spans == 1  # 128 tiles
    assert launch(1, 1024, 4096, *H200).spans == 4  # 32 tiles would leave three of four multiprocessors idle
    assert (launch(2048, 4096, 4096, *H200).block_n, launch(2048, 4096, 4096, *H200).block_k) == (256, 128)
    assert launch(512, 4096, 4096, *H200).block_n == 128
    assert launch(2048, 4096, 4096, 108, SHARED_MEMORY[80]).block_k == 64


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus(tmp_path, capability):
    """The compiler refuses what the interpreter takes. Weights travel asynchronously, 16 bytes a thread, to int8 tensor cores."""
    pytest.importorskip("triton")
    program = f"""
import torch
from llmq.ops.triton_support import load
int8 = load("int8")
def launched(m, n, k, dtype, static, bias):
    x, weight = torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=torch.int8)
    how = int8.launch(m, n, k, 132, {SHARED_MEMORY[capability]})
    given = torch.ones(1) if static else None
    int8.linear(x, weight, torch.empty(n, 1), given, torch.empty(n, dtype=dtype) if bias else None, 1e-5, how)
for m in {(1, 2048) if capability == 80 else (1, 16, 2048)}:
    for n, k in {SHAPES_7B}:
        launched(m, n, k, torch.bfloat16, False, False)
launched(2, 50, 4112, torch.float16, True, True)
int8.quantize(torch.empty(16, 4096, dtype=torch.bfloat16), None, 1e-5, symmetric=False)
int8.quantize(torch.empty(16, 4096), torch.ones(1), 1e-5, symmetric=True)
"""
    found = compiled(program, capability, tmp_path)
    products = [kernel for kernel in found if kernel.kernel == "_int8_product"]
    assert {kernel.kernel for kernel in found} == {"_int8_product", "_int8_finish", "_quantize_rows"}
    for kernel in found:
        assert kernel.spilled == 0
        assert kernel.shared <= SHARED_MEMORY[capability]
    for kernel in products:
        assert kernel.count(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10")
        assert kernel.count(r"mma\S*\.s8\.s8")
    assert (capability < 90) or any(kernel.count(r"wgmma\.mma_async\S*m64n128k32\.s32\.s8\.s8") for kernel in products)
