"""Peak memory of a stretch of a run."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"
"""What clear_refs takes for 'let the peak of the resident set be its present size' (man proc_pid_clear_refs)."""


@dataclass(slots=True)
class PeakMemory:
    """The most memory that was held; filled in when `peak_memory`'s block ends."""

    nbytes: int
    kind: Literal["resident set", "allocator"]
    since: Literal["run", "process"]
    """What the peak is of: the block alone, or all of the process's life where the kernel does not let us start over."""


@contextmanager
def peak_memory(device: torch.device | str) -> Iterator[PeakMemory]:
    """Measure the peak inside the block: the process's resident set on a CPU, torch's allocator on a GPU.

    The resident set counts memory-mapped weights as far as they were touched, the interpreter, and torch itself.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak = PeakMemory(0, "allocator", "run")
        yield peak
        peak.nbytes = torch.cuda.max_memory_allocated(device)
        return
    peak = PeakMemory(0, "resident set", "run" if _start_over() else "process")
    yield peak
    peak.nbytes = resident_peak_bytes()


def resident_peak_bytes() -> int:
    """Return the peak of this process's resident set: since it was last reset, on Linux, or since its start."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _start_over() -> bool:
    """Reset the kernel's peak to the present size; say whether it could be."""
    try:
        _RESET.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True
