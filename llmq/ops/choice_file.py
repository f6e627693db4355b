"""Where measured times of kernels are kept: a JSON file that any number of machines and processes share.

    {"version": 1, "machines": {KEY: {"machine": {device, driver, torch, …}, "times": {CASE: {kernel: [seconds, …]}}}}}

KEY is a hash of the machine, so that another GPU, driver, torch or Triton finds nothing and measures anew, and a home directory
that several machines mount serves them all. A file that cannot be read, or written, costs the time to measure and nothing else:
it is said once, and the work goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import llmq
from llmq.errors import OutputError
from llmq.files import atomic_path
from llmq.ops import native
from llmq.ops.choices import ROWS, Timer, Times
from llmq.ops.native_signatures import ABI_VERSION
from llmq.ops.schema import Case, Kernel
from llmq.progress import SILENT, Progress
from llmq.results.environment import cpu_features, cpu_name

_NVIDIA = Path("/proc/driver/nvidia/version")
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Machine(BaseModel):
    """What times depend on besides the case."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    driver: str
    torch: str
    triton: str
    llmq: str
    threads: int

    @property
    def key(self) -> str:
        """A hash of everything."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class _Measured(BaseModel):
    model_config = ConfigDict(extra="forbid")

    machine: Machine
    times: dict[str, dict[str, Annotated[list[_Seconds], Field(min_length=len(ROWS), max_length=len(ROWS))]]]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    machines: dict[str, _Measured] = {}


def choices_path() -> Path:
    """Return where times are kept: in the platform's folder for caches."""
    return platformdirs.user_cache_path("llmq", appauthor=False) / "kernel-choices.json"


def this_machine(device: str) -> Machine:
    """Describe this machine, for kernels on `device` ('cpu' or 'cuda')."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    status = native.status()
    library = f"native {status.isa}, ABI {ABI_VERSION}" if isinstance(status, native.Available) else "no native library"
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        name = f"{properties.name}, {properties.multi_processor_count} SMs, {properties.total_memory >> 20} MiB"
        return Machine(device=name, driver=_driver(), torch=torch.__version__, triton=triton, llmq=llmq.__version__, threads=0)
    return Machine(
        device=f"{cpu_name()} ({' '.join(cpu_features())})",
        driver="none",
        torch=torch.__version__,
        triton=triton,
        llmq=f"{llmq.__version__}, {library}",
        threads=torch.get_num_threads(),
    )


class KeptTimes:
    """A `Timer` that measures each case once a machine.

    Args:
        path: the file; it and its folder need not exist.
        machine: whose times they are.
        measure: what measures.
        progress: is told what cannot be read or written.
    """

    def __init__(self, path: Path, machine: Machine, measure: Timer, progress: Progress = SILENT) -> None:
        self._path = path
        self._machine = machine
        self._measure = measure
        self._progress = progress
        self._said = False

    def __call__(self, case: Case, kernels: Sequence[Kernel]) -> Times:
        """Return the times of `kernels`, all of them measured together."""
        kept = self._read().machines.get(self._machine.key)
        times: Times | None = kept.times.get(_key(case)) if kept else None
        if times is not None and set(times) == {kernel.name for kernel in kernels}:
            return times
        times = self._measure(case, kernels)
        self._keep(_key(case), times)
        return times

    def _read(self) -> _File:
        try:
            return _File.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return _File()
        except ValidationError as error:
            found = error.errors()[0]
            where = ".".join(str(part) for part in found["loc"])
            self._say(f"{self._path} is damaged or of another version ({where or 'not JSON'}: {found['msg']}); it is made anew.")
        except OSError as error:
            self._say(f"{self._path} cannot be read ({error.strerror}); kernels are measured anew.")
        return _File()

    def _keep(self, key: str, times: Times) -> None:
        """Add to what the file holds by now: other processes may have written since it was read."""
        try:
            with _locked(self._path):
                file = self._read()
                measured = file.machines.setdefault(self._machine.key, _Measured(machine=self._machine, times={}))
                measured.times[key] = {name: list(seconds) for name, seconds in times.items()}
                with atomic_path(self._path, force=True) as temporary:
                    temporary.write_text(file.model_dump_json(indent=1), encoding="utf-8")
        except (OSError, OutputError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self._say(f"the times of kernels cannot be kept in {self._path} ({reason}); they are measured again next time.")

    def _say(self, message: str) -> None:
        if not self._said:
            self._said = True
            self._progress.note(message)


def _key(case: Case) -> str:
    return f"{json.dumps(case.format.to_json(), sort_keys=True)} [{case.n}, {case.k}] {case.dtype}"


def _driver() -> str:
    """Return the version of NVIDIA's driver, or 'unknown' where the system does not tell."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", _NVIDIA.read_text())
    except OSError:
        return "unknown"
    return found[0] if found else "unknown"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from changing `path` meanwhile: a lock on a file beside it, which stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
