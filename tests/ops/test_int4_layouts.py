"""torch packs int4 in another order for each instruction set; whatever the order is, unpacking finds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmq.ops.features import is_x86

PROGRAM = """
import torch
from op_cases import FORMATS, assert_kernel_close, case_of, make_weight, make_x
from llmq.ops.aten import AtenInt4PackCpu
from llmq.ops.features import aten_capability

kernel = AtenInt4PackCpu()
assert kernel.layout == "int4pack-" + aten_capability().lower()
for n, k in ((16, 64), (48, 192), (80, 128)):
    weight, x = make_weight(FORMATS["int4"], n, k), make_x(5, k, torch.bfloat16)
    case = case_of(FORMATS["int4"], n, k, torch.bfloat16)
    packed = kernel.prepack(weight)
    back = kernel.unpack(packed, case)
    assert all(torch.equal(a, b) for a, b in zip(weight.tensors, back.tensors, strict=True))
    assert_kernel_close(kernel.linear(x, packed, None, case), x, weight, None, case, kernel.name)
print(kernel.layout, bytes(packed[0].reshape(-1).tolist()).hex())
"""


@pytest.mark.slow
@pytest.mark.skipif(not is_x86(), reason="the capabilities are x86's")
def test_every_instruction_sets_layout_unpacks():
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent.parent), str(here), os.environ.get("PYTHONPATH", "")])
    seen = {}
    for capability in ("default", "avx2", "avx512"):
        if capability == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
            continue
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": path}
        run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        layout, packed = run.stdout.split()
        seen[layout] = packed
    assert len(set(seen.values())) == len(seen)  # the reason why packed bytes are never saved
