"""How weight-only products are cut for a GPU, at the sizes of a 7B model; and what Triton makes of the kernels there."""

from __future__ import annotations

import math

import pytest
from triton_compile import SHARED_MEMORY, compiled

from llmq.ops import triton_support

pytest.importorskip("triton")
cuts = triton_support.load("weight_only")
int8 = triton_support.load("weight_only_int8")
int4 = triton_support.load("weight_only_int4")

H200 = cuts.Gpu(132, 227 << 10)
A100 = cuts.Gpu(108, 163 << 10)
SMALL = cuts.Gpu(20, 99 << 10)
SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (11008, 4096), (4096, 11008), (32000, 4096)]  # [N, K]

INT8_PROGRAM = """
import torch
from llmq.kernels.triton import weight_only_int8
from llmq.kernels.triton.weight_only import Gpu
gpu, bf16, (n, k) = Gpu(132, {shared}), torch.bfloat16, (4096, 11008)
weight, scale = torch.empty(n, k, dtype=torch.int8), torch.empty(n, 1, dtype=bf16)
for m in {rows}:
    weight_only_int8.linear(torch.empty(m, k, dtype=bf16), weight, scale, None, gpu)
"""
INT4_PROGRAM = """
import torch
from llmq.kernels.triton import weight_only_int4
from llmq.kernels.triton.weight_only import Gpu
gpu, bf16, (n, k) = Gpu(132, {shared}), torch.bfloat16, (4096, 11008)
for group, zero in {grids}:
    words, scale = torch.empty(n, k // 8, dtype=torch.int32), torch.empty(n, k // group, dtype=bf16)
    zero = None if zero is None else torch.empty(n, k // group, dtype=zero)
    for m in {rows}:
        weight_only_int4.linear(torch.empty(m, k, dtype=bf16), words, scale, zero, None, gpu)
"""


def launches(rows, n, k, gpu):
    """The cuts of int8 with one scale a row, of int8 with a scale a group, and of int4."""
    return [int8.launch(rows, n, k, k, gpu), int8.launch(rows, n, k, 48, gpu), int4.launch(rows, n, k, gpu)]


@pytest.mark.parametrize("gpu", [H200, A100, SMALL])
def test_every_input_is_in_one_part_and_no_part_is_empty(gpu):
    for n, k in [*SHAPES, (50, 96), (1, 32), (8, 160), (3, 1 << 17)]:
        for rows in (1, 2, 16, 17, 33, 64, 65, 2048):
            for how in launches(rows, n, k, gpu):
                assert how.span % how.block_k == 0
                assert (how.cuts - 1) * how.span < k <= how.cuts * how.span
                assert how.block_m == 1 if rows == 1 else how.block_m >= 16  # the least that tensor cores take
                for size in (how.block_m, how.block_n, how.block_k, how.warps):
                    assert size & (size - 1) == 0


@pytest.mark.parametrize("gpu", [H200, A100])
def test_a_row_fills_the_gpu_without_cutting_k(gpu):
    for n, k in SHAPES:
        for how in (int8.launch(1, n, k, k, gpu), int4.launch(1, n, k, gpu)):
            assert how.cuts == 1
            assert math.ceil(n / how.block_n) >= 3 * gpu.multiprocessors
            threads = 32 * how.warps
            bits = 8 if how.block_k == 2048 else 4
            assert how.block_k * bits // 8 == threads * cuts.LANE_BYTES  # each thread loads 16 bytes of every output
    assert int8.launch(1, 64, 4096, 4096, gpu).cuts == 2  # N alone is too little: K is all there is


def test_few_rows_cut_k_so_that_programs_are_several_a_multiprocessor():
    for n, k in SHAPES:
        for how in (int8.launch(16, n, k, k, H200), int4.launch(16, n, k, H200)):
            programs = math.ceil(n / how.block_n) * how.cuts
            assert programs >= (1.5 if n > 1024 else 0.9) * H200.multiprocessors  # of 4 steps or more each, see below
            assert how.block_m == 16
            assert how.span >= 4 * how.block_k
    assert int4.launch(16, 32000, 4096, H200).cuts == 1


def test_many_rows_take_whole_tiles():
    for n, k in SHAPES:
        for how in (int8.launch(2048, n, k, k, H200), int4.launch(2048, n, k, H200)):
            assert (how.block_m, how.block_n, how.cuts) == (128, 128, 1)


@pytest.mark.parametrize("gpu", [H200, A100, SMALL])
def test_steps_under_way_fit_into_shared_memory(gpu):
    for rows in (2, 16, 17, 64, 65, 2048):
        for how, bytes_of_32_codes in (
            (int8.launch(rows, 4096, 4096, 4096, gpu), 32),
            (int4.launch(rows, 4096, 4096, gpu), 16),
        ):
            step = how.block_m * how.block_k * 2 + how.block_n * how.block_k * bytes_of_32_codes // 32
            assert 2 <= how.stages <= 4
            assert how.stages * step <= gpu.shared_bytes


def check(kernel, capability):
    """What holds for every kernel: it fits, nothing spills, and codes are loaded 16 bytes at a time."""
    assert kernel.shared <= SHARED_MEMORY[capability], kernel.kernel
    assert kernel.registers * 32 * kernel.warps <= 65536
    assert kernel.spilled == 0, kernel.kernel
    assert kernel.count(r"\.ftz") == 0  # subnormal numbers count
    if kernel.kernel == "_one_row":
        assert kernel.count(r"ld\.global\.v4\.b32") >= kernel.warps
        assert kernel.count(r"cvt\.rn\.f32\.[su]") <= 8  # slow, see the modules: none but those of zero points
    elif kernel.kernel == "_rows":
        assert kernel.count("wgmma.mma_async|mma.sync") > 0
        assert kernel.count(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10") > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "rows", "grids"),
    [(90, "(1, 16, 256)", "[(128, None)]"), (80, "(1, 16)", "[(128, bf16)]"), (90, "(1, 4)", "[(32, torch.uint8)]")],
)
def test_int4_compiles(capability, rows, grids, tmp_path):
    kernels = compiled(INT4_PROGRAM.format(shared=SHARED_MEMORY[capability], rows=rows, grids=grids), capability, tmp_path)
    assert {kernel.kernel for kernel in kernels} == {"_one_row", "_rows", "_add_parts"}
    for kernel in kernels:
        if not (
            kernel.kernel == "_rows" and "32" in grids
        ):  # its steps are of 16 bytes a row, and Triton keeps them in registers
            check(kernel, capability)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "rows"), [(90, "(1, 16, 256)"), (80, "(1, 16)")])
def test_int8_compiles(capability, rows, tmp_path):
    kernels = compiled(INT8_PROGRAM.format(shared=SHARED_MEMORY[capability], rows=rows), capability, tmp_path)
    assert {kernel.kernel for kernel in kernels} == {"_one_row", "_rows", "_add_parts"}
    for kernel in kernels:
        check(kernel, capability)
        assert kernel.count(r"cp\.async\.c[ag]\.") == kernel.count(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10")
