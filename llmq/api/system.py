"""What this machine and installation offer."""

from __future__ import annotations

import os
from typing import Any

import torch

from llmq.ops import native
from llmq.ops.select import KernelRow, kernel_table
from llmq.results.environment import capture
from llmq.results.record import Environment
from llmq.schemes.registry import describe_schemes


def environment(threads: int | None = None) -> dict[str, Any]:
    """Return the environment as result records have it, and the state of what is optional, as plain data."""
    captured: Environment = capture(threads=threads or len(os.sched_getaffinity(0)), device="cpu")
    status = native.status()
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        **captured.model_dump(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native": {"available": isinstance(status, native.Available), **_fields(status)},
        "cuda": cuda or "not available: torch sees no CUDA device",
        "wikitext_dir": os.environ.get("LLMQ_WIKITEXT_DIR", "not set: WikiText-2 through datasets, else the bundled sample"),
    }


def _fields(status: native.Available | native.Unavailable) -> dict[str, Any]:
    return {name: getattr(status, name) for name in status.__dataclass_fields__}


def kernel_list() -> list[KernelRow]:
    """Return every kernel with whether it can run here, and why not."""
    return kernel_table()


def scheme_list(name: str | None = None) -> list[dict[str, Any]]:
    """Describe every scheme, or one."""
    return describe_schemes(name)
