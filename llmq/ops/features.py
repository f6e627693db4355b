"""What this CPU is good at, as far as choosing a kernel goes."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the feature flags Linux reports for the first core ('avx2', 'avx512_vnni', 'asimdhp', …); empty elsewhere."""
    if not _CPUINFO.exists():
        return frozenset()
    for line in _CPUINFO.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


@functools.cache
def aten_capability() -> str:
    """Return the instruction set torch's own kernels were dispatched for: 'DEFAULT', 'AVX2', 'AVX512', 'SVE256'."""
    return torch.backends.cpu.get_cpu_capability()


def is_x86() -> bool:
    """Whether this is a 64-bit x86 machine."""
    return platform.machine().lower() in {"x86_64", "amd64"}


def has_int8_dot() -> bool:
    """Whether torch's int8 matrix product is vectorised here: oneDNN asks for AVX-512 VNNI."""
    return aten_capability() == "AVX512" and "avx512_vnni" in cpu_flags()


def has_bf16_dot() -> bool:
    """Whether this CPU multiplies bf16 faster than fp32: AVX-512 BF16, AMX, or Arm's bf16 instructions."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"}) and aten_capability() not in {"DEFAULT", "AVX2"}


def has_native_gemm(dtype: torch.dtype) -> bool:
    """Whether matrix products of `dtype` run at the speed of the hardware, not of a conversion loop."""
    flags = cpu_flags()
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return aten_capability() == "AVX512" or bool(flags & {"amx_bf16", "bf16", "sve_bf16"})
    if dtype == torch.float16:
        return bool(flags & {"avx512_fp16", "amx_fp16", "asimdhp"})
    return False
