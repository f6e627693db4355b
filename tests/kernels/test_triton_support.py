"""What is said where Triton's kernels cannot run, and that nothing loads Triton before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from llmq.errors import KernelError
from llmq.ops import cuda, triton_support


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a compute capability, as far as torch says."""

    def put_in(capability):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return put_in


def test_it_names_what_is_missing(gpu, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_support, "_installed", lambda: False)
    assert "Triton is not installed" in triton_support.triton_gpu().reason
    with pytest.raises(KernelError, match="Triton is not installed"):
        triton_support.load("split")
    monkeypatch.setattr(triton_support, "_installed", lambda: True)
    gpu(None)
    assert triton_support.triton_gpu().reason == "there is no CUDA GPU"
    gpu((7, 5))
    assert triton_support.triton_gpu().reason == "it needs compute capability 8.0, and this GPU has 7.5"
    assert cuda.Tinygemm().available().reason == "it needs compute capability 8.0, and this GPU has 7.5"
    gpu((8, 0))
    assert triton_support.triton_gpu().ok
    assert triton_support.triton_gpu((9, 0)).reason == "it needs compute capability 9.0, and this GPU has 8.0"
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert triton_support.triton_gpu().reason == "this torch is built without CUDA"


def test_the_interpreter_is_for_tests(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET is 1" in triton_support.triton_gpu().reason
    triton_support.check_device(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert triton_support.triton_gpu().ok
    with pytest.raises(KernelError, match="these are on cpu"):
        triton_support.check_device(torch.zeros(1))


def test_an_installation_without_its_kernels_says_so():
    with pytest.raises(KernelError, match=r"'nothing' cannot be loaded .*reinstall llmq"):
        triton_support.load("nothing")


@pytest.mark.slow
def test_choosing_kernels_does_not_load_triton():
    program = "import sys, llmq.ops.select as s; s.kernel_table(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
