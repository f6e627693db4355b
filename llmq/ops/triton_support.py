"""Whether Triton's kernels can run here, and their modules, loaded when they are first used.

The kernels (`kernels/triton`, installed as `llmq.kernels.triton`) know torch and Triton only; their `Kernel` wrappers are in this
package. Nothing here imports Triton before a kernel runs: asking costs a look at the file system.

Triton's interpreter (the environment variable TRITON_INTERPRET=1, which must be set before anything imports Triton) runs the same
kernels in Python on tensors of the CPU. The tests use it; a model is never given to it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from llmq.errors import KernelError
from llmq.ops.cuda import AMPERE, GpuKernel, cuda_gpu, on_gpu
from llmq.ops.schema import SUPPORTED, Case, Support, unsupported


def interpreted() -> bool:
    """Whether Triton's kernels are run by its interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_gpu(least: tuple[int, int] = AMPERE) -> Support:
    """Whether Triton is here, with a CUDA GPU of at least that compute capability to run its kernels on."""
    if not _installed():
        return unsupported("Triton is not installed (pip install 'llmq[triton]')")
    answer = cuda_gpu(least)
    if answer.ok and interpreted():
        return unsupported("TRITON_INTERPRET is 1, and Triton's interpreter is for tests; unset it")
    return answer


class TritonKernel(GpuKernel):
    """A `GpuKernel` that Triton compiles."""

    def available(self) -> Support:
        """See `Kernel.available`."""
        return triton_gpu(self.least)


def weight_only(case: Case) -> Support:
    """Whether it is a case of 16-bit activations on a GPU."""
    answer = on_gpu(case)
    if not answer.ok:
        return answer
    if case.format.activation is not None:
        return unsupported("it does not quantize activations")
    if case.dtype not in (torch.bfloat16, torch.float16):
        return unsupported(f"it takes bfloat16 and float16 activations, and these are {case.dtype}")
    return SUPPORTED


def register(library: torch.library.Library, name: str, real: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Implement the defined operator `llmq::name` by one of Triton's kernels: on GPUs, and in the interpreter on the CPU."""
    library.impl(name, real, "CUDA")  # type: ignore[no-untyped-call]
    library.impl(name, real, "CPU")  # type: ignore[no-untyped-call]  # outside of the interpreter it says what is wrong
    torch.library.register_fake(f"llmq::{name}", fake, lib=library)


def load(name: str) -> ModuleType:
    """Return the module of kernels `llmq.kernels.triton.<name>`.

    Raises:
        KernelError: when Triton is not installed, or llmq was installed without its GPU kernels.
    """
    if not _installed():
        raise KernelError("Triton is not installed; pip install 'llmq[triton]'.")
    return _module(name)


def check_device(tensor: torch.Tensor) -> None:
    """Raise KernelError unless Triton's kernels can read the tensor: on a GPU, or, in the interpreter, on the CPU."""
    if tensor.is_cuda or (tensor.is_cpu and interpreted()):
        return
    raise KernelError(f"Triton's kernels take tensors on a CUDA GPU, and these are on {tensor.device}; move them there.")


def readable(x: torch.Tensor) -> torch.Tensor:
    """Return x [M, K] with the elements of a row adjacent, copied only where they are not."""
    return x if x.stride(1) == 1 else x.contiguous()


def gpu_of(x: torch.Tensor) -> Any:
    """Return what `weight_only` knows of the GPU that x is on, as its `Gpu`; raises KernelError where Triton cannot read x."""
    check_device(x)
    return load("weight_only").Gpu(multiprocessors(x.device), shared_memory(x.device))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors the tensors' device has; in the interpreter those of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return how many bytes of shared memory one program may have on the tensors' device; in the interpreter those of an H200."""
    if device.type != "cuda":
        return 227 << 10
    size: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return size


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"llmq.kernels.triton.{name}")
    except ModuleNotFoundError as error:
        raise KernelError(f"the module of GPU kernels {name!r} cannot be loaded ({error}); reinstall llmq.") from error
