"""What Triton makes of the kernels for a GPU, on a machine without one.

`compiled(program, capability)` runs a program in a process of its own in which Triton believes in a GPU and compiles what is
launched, to machine code, without running it. The launchers are called as models call them, so the code is that of the real block
sizes and alignments; tensors may lie on the CPU, and `torch.empty` of a large one costs nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory that one block may have, by compute capability."""


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel: what it takes of a multiprocessor, and its code."""

    kernel: str
    warps: int
    shared: int
    registers: int
    spilled: int
    """Bytes a thread."""
    ptx: str
    sass: str

    def count(self, pattern: str) -> int:
        """How often a regular expression occurs in the PTX."""
        return len(re.findall(pattern, self.ptx))


def compiled(program: str, capability: int, cache: Path) -> list[Compiled]:
    """Compile everything that `program` launches.

    Args:
        program: Python source.
        capability: of the GPU, 80 or 90.
        cache: a folder for Triton's cache.

    Returns:
        The kernels in the order of their launches; each specialisation once.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, str(capability)],
        input=program,
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Compiled(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def _pretend_a_gpu(capability: int, found: Callable[[Any], None]) -> None:
    """Have Triton compile for a GPU that is not there, and hand every kernel to `found` instead of launching it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Pretended:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Pretended())
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found(kernel)
        return kernel

    JITFunction.run = compile_only


def _describe(kernel: Any, folder: Path) -> Compiled:
    from triton import knobs

    cubin = folder / f"{kernel.hash}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    sass = subprocess.run([knobs.nvidia.cuobjdump.path, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    return Compiled(kernel.metadata.name, warps, shared, registers, stack, kernel.asm["ptx"], sass)


def main() -> None:
    """Run the program on standard input; print what it launched."""
    import tempfile

    kernels: dict[str, Any] = {}
    _pretend_a_gpu(int(sys.argv[1]), lambda kernel: kernels.setdefault(kernel.hash, kernel))
    exec(compile(sys.stdin.read(), "program", "exec"), {"__name__": "program"})
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps([asdict(_describe(kernel, Path(folder))) for kernel in kernels.values()]))


if __name__ == "__main__":
    main()
