"""The CUDA kernels without a GPU: their limits, what they say on this machine, and everything of their packing that runs here."""

from __future__ import annotations

import pytest
import torch
from op_cases import FORMATS, assert_kernel_close, case_of, make_weight, make_x
from torch._subclasses import FakeTensorMode

from llmq.numerics.grid import IntGrid, LinearFormat
from llmq.ops.aten import from_tinygemm, pack_int4_cuda, scale_and_zero
from llmq.ops.cuda import INNER_K_TILES, CudaIntMm, Tinygemm, int32_nibbles, paired
from llmq.ops.nibbles import nibble_codes

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")


@needs_no_gpu
@pytest.mark.parametrize(("kernel", "name"), [(Tinygemm(), "int4"), (CudaIntMm(), "int8-dynamic")])
def test_without_a_gpu_it_says_so(kernel, name):
    case = case_of(FORMATS[name], 64, 128, torch.bfloat16, "cuda")
    assert kernel.fits(case).ok
    assert "CUDA" in kernel.supports(case).reason
    assert not kernel.available().ok
    assert "for CUDA GPUs, and the weight is on cpu" in kernel.supports(case_of(FORMATS[name], 64, 128, torch.bfloat16)).reason


@pytest.mark.parametrize(
    ("name", "n", "k", "dtype", "words"),
    [
        ("int4", 12, 128, torch.bfloat16, "multiples of 8 outputs, and N is 12"),
        ("int4", 16, 96, torch.bfloat16, "multiples of 128 inputs, and K is 96"),
        ("int4", 16, 128, torch.float16, "bfloat16 activations"),
        ("int4-integer-zero", 16, 128, torch.bfloat16, "integer zero point"),
        ("int8-weight-only", 16, 128, torch.bfloat16, "weights of 2 to 4 bits"),
        ("int8-dynamic-int4", 16, 128, torch.bfloat16, "does not quantize activations"),
    ],
)
def test_tinygemm_names_the_limit(name, n, k, dtype, words):
    answer = Tinygemm().fits(case_of(FORMATS[name], n, k, dtype, "cuda"))
    assert not answer.ok
    assert words in answer.reason


@pytest.mark.parametrize(
    ("grid", "words"),
    [(IntGrid(4, 16, scale_dtype="bfloat16"), "groups of 32, 64, 128, 256, and these have 16"), (IntGrid(4, 32), "float32 ones")],
)
def test_tinygemm_names_the_grid_it_lacks(grid, words):
    answer = Tinygemm().fits(case_of(LinearFormat(grid), 16, 128, torch.bfloat16, "cuda"))
    assert words in answer.reason


@pytest.mark.parametrize(
    ("name", "n", "k", "words"),
    [
        ("int8-dynamic", 12, 64, "multiples of 8 inputs and outputs, and N is 12"),
        ("int8-dynamic", 16, 68, "K is 68"),
        ("int8-dynamic-int4", 16, 64, "symmetric int8 activations"),
        ("int8-weight-only", 16, 64, "symmetric int8 activations"),
    ],
)
def test_int_mm_names_the_limit(name, n, k, words):
    answer = CudaIntMm().fits(case_of(FORMATS[name], n, k, torch.bfloat16, "cuda"))
    assert not answer.ok
    assert words in answer.reason


@pytest.mark.parametrize("name", ["int4", "int4-symmetric", "int3-float-zero", "int2"])
def test_tinygemm_parts_come_back_bit_for_bit(name):
    weight = make_weight(FORMATS[name], 16, 128)
    case = case_of(FORMATS[name], 16, 128, torch.bfloat16, "cuda")
    scales = scale_and_zero(weight)
    assert scales.shape == (weight.scale.shape[1], 16, 2)
    back = from_tinygemm(nibble_codes(weight), scales, case)
    assert all(torch.equal(a, b) for a, b in zip(weight.tensors, back.tensors, strict=True))
    # (q - 8) * s + z, tinygemm's arithmetic, is the weight.
    group = FORMATS[name].weight.group_size
    s, z = (part.T.double().repeat_interleave(group, dim=1) for part in scales.unbind(-1))
    assert torch.equal((nibble_codes(weight).double() - 8) * s + z, weight.dequantize(torch.float64))


def test_tinygemm_packs_from_pairs_with_the_even_input_high():
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    assert paired(codes).tolist() == [[0x12, 0x34]]
    words = torch.tensor([0x76543210, -1, -0x80000000], dtype=torch.int32)
    assert int32_nibbles(words).tolist() == [*range(8), *[15] * 8, *[0] * 7, 8]


def test_tinygemm_has_the_shapes_torch_documents():
    shape = scale_and_zero(make_weight(FORMATS["int4"], 16, 128)).shape
    case = case_of(FORMATS["int4"], 16, 128, torch.bfloat16, "cuda")
    with FakeTensorMode():
        pairs = torch.empty(16, 64, dtype=torch.uint8, device="cuda")
        packed = pack_int4_cuda(pairs, INNER_K_TILES)
        assert packed.dtype == torch.int32
        assert packed.shape == (16 // 8, 128 // (INNER_K_TILES * 16), 32, INNER_K_TILES // 2)
        scales = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        y = Tinygemm().linear(torch.empty(3, 128, dtype=torch.bfloat16, device="cuda"), (packed, scales), None, case)
        assert y.shape == (3, 16)
        assert y.dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("kernel", "name"), [(Tinygemm(), "int4"), (Tinygemm(), "int4-symmetric"), (CudaIntMm(), "int8-dynamic")]
)
def test_on_a_gpu(kernel, name):
    for m in (0, 1, 16, 17, 64):
        case = case_of(FORMATS[name], 48, 384, torch.bfloat16, "cuda")
        weight, x = make_weight(FORMATS[name], 48, 384), make_x(m, 384, torch.bfloat16)
        packed = kernel.prepack(weight.to("cuda"))
        back = kernel.unpack(packed, case).to("cpu")
        assert all(torch.equal(a, b) for a, b in zip(weight.tensors, back.tensors, strict=True))
        y = kernel.linear(x.cuda(), packed, None, case).cpu()
        assert_kernel_close(y, x, weight, None, case_of(FORMATS[name], 48, 384, torch.bfloat16), kernel.name)
