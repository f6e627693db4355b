"""Where a result was measured. Imports no torch, so that `llmq env` and records cost nothing to make."""

from __future__ import annotations

import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmq

if TYPE_CHECKING:
    from llmq.results.record import Environment

PACKAGES = ("torch", "numpy", "safetensors", "sentencepiece", "tokenizers", "tiktoken", "datasets", "lm-eval", "pydantic")
"""Distributions whose version can change a number, or explain one."""

_FEATURES = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)
"""CPU features that kernels choose by, as Linux names them: x86 first, then Arm."""

_ROOT = Path("/")


def capture(threads: int, device: str = "cpu") -> Environment:
    """Return where this process runs.

    Args:
        threads: CPU threads the measured code was given.
        device: "cpu", or "cuda" and the name of the GPU, such as "cuda (NVIDIA H200)".
    """
    from llmq.results.record import Environment  # pydantic: who asks for a CPU's name or cache does without

    return Environment(**facts(threads, device), memory_bytes=available_memory_bytes())


def facts(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Return what `capture` says, as plain data and without the memory, which needs psutil."""
    return {
        "llmq": llmq.__version__,
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "cores": available_cores(),
        "threads": threads,
        "device": device,
    }


def package_versions() -> dict[str, str]:
    """Return the versions of `PACKAGES`, without those that are not installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def cpu_name(root: Path = _ROOT) -> str:
    """Return the CPU's name, or its architecture where the kernel does not tell (most Arm machines)."""
    return _cpuinfo(root).get("model name") or platform.processor() or platform.machine()


def cpu_features(root: Path = _ROOT) -> list[str]:
    """Return those features of this CPU that kernels choose by, in the order of `_FEATURES`; [] where none can be read."""
    info = _cpuinfo(root)
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [feature for feature in _FEATURES if feature in flags]


def available_cores(root: Path = _ROOT) -> int:
    """Return how many cores this process can keep busy: its affinity, and its control group's quota rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cpu_quota(root)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Return how much memory this process could have: the machine's, or its control group's limit where that is less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limits = []
    for name in ("memory.max", "memory.limit_in_bytes"):
        for folder in _cgroup_folders(root, "memory"):
            limits += [int(text) for text in _lines(folder / name) if text.isdigit()]
    return min([total, *limits])


def last_level_cache_bytes(root: Path = _ROOT) -> int | None:
    """Return the size of the largest cache that core 0 reads through, or None where Linux does not tell."""
    sizes = []
    for index in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        for text in _lines(index / "size"):
            digits, unit = text.rstrip("KMG"), text[-1:]
            if digits.isdigit():
                sizes.append(int(digits) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(unit, 1))
    return max(sizes, default=None)


def _cgroup_cpu_quota(root: Path) -> float | None:
    """Return the CPU time a second that the control group may use, in cores; None when it is not limited."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        for line in _lines(folder / "cpu.max"):  # version 2: "200000 100000" or "max 100000"
            quota, _, period = line.partition(" ")
            if quota.isdigit() and period.isdigit():
                quotas.append(int(quota) / int(period))
        quota_us, period_us = _lines(folder / "cpu.cfs_quota_us"), _lines(folder / "cpu.cfs_period_us")
        if quota_us and period_us and int(quota_us[0]) > 0:  # version 1; the kernel writes -1 for "no limit"
            quotas.append(int(quota_us[0]) / int(period_us[0]))
    return min(quotas, default=None)


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Return the folders of this process's control group and all those above it, for versions 1 and 2."""
    folders = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controller if controllers else root / "sys/fs/cgroup"
        parts = [part for part in path.split("/") if part not in ("", "..")]
        folders += [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    return folders


def _cpuinfo(root: Path) -> dict[str, str]:
    """Return the key-value pairs of the first processor in /proc/cpuinfo."""
    pairs: dict[str, str] = {}
    for line in _lines(root / "proc/cpuinfo"):
        key, colon, value = line.partition(":")
        if colon:
            pairs.setdefault(key.strip(), value.strip())
    return pairs


def _lines(path: Path) -> list[str]:
    """Return the lines of a file of the kernel's; [] where this kernel does not have it or does not let us see it."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
