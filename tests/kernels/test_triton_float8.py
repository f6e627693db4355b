"""The kernel of 8-bit weights with float8 codes: in Triton's interpreter against the exact result, and what it compiles to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from op_cases import FORMATS, assert_kernel_close, case_of, make_weight, make_x
from triton_compile import SHARED_MEMORY, compiled

from llmq.ops.float8 import TritonFloat8

FORMAT = FORMATS["float8-weight-only"]
KERNEL = TritonFloat8()

PROGRAM = """
import torch
from llmq.ops.triton_support import load
gpu = load("weight_only").Gpu(132, {shared})
for rows in (1, 8):
    x, weight = torch.empty(rows, 4096, dtype=torch.bfloat16), torch.empty(1024, 4096, dtype=torch.float8_e4m3fn)
    load("weight_only_float8").linear(x, weight, torch.empty(1024, 1, dtype=torch.bfloat16), None, gpu)
"""


@pytest.mark.parametrize(("m", "n", "k"), [(0, 16, 32), (1, 48, 320), (1, 5, 2064), (3, 50, 1040), (17, 70, 144)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_close_to_the_exact_result(triton_device, m, n, k, dtype):
    weight, x = make_weight(FORMAT, n, k, seed=m), make_x(m, k, dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    case = case_of(FORMAT, n, k, dtype)
    for term in (None, bias):
        addend = None if term is None else term.to(triton_device)
        for rows in (x, x.T.contiguous().T):
            y = KERNEL.linear(rows.to(triton_device), weight.to(triton_device).tensors, addend, case).cpu()
            assert_kernel_close(y, x, weight, term, case, KERNEL.name)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [89, 90])
def test_compiles_to_the_hardware_s_conversion_and_keeps_within_its_registers(capability, tmp_path):
    kernels = compiled(PROGRAM.format(shared=SHARED_MEMORY[capability]), capability, tmp_path)
    products = [kernel for kernel in kernels if kernel.count(r"cvt\.rn\.f16x2\.e4m3x2")]
    one, few = products
    assert one.count(r"ld\.global.*\.v4") > 0  # 16 bytes of codes at once
    assert one.count(r"wgmma|mma\.sync") == 0
    assert few.count(r"wgmma|mma\.sync") > 0
    for kernel in kernels:
        assert kernel.spilled == 0
        assert kernel.shared <= SHARED_MEMORY[capability]
