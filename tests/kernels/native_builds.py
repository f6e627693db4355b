"""How this room builds the library anew: with sanitizers, with emulated instructions, for another architecture."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent.parent
KERNELS = REPO / "kernels"
DRIVER = Path(__file__).parent / "driver.cpp"
LLAMA_DRIVER = Path(__file__).parent / "llama_driver.cpp"


def needs(*tools: str) -> None:
    """Skip where a tool is missing, except where the native kernels are required."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing and os.environ.get("LLMQ_REQUIRE_NATIVE") == "1" and set(missing) & {"cmake", "c++"}:
        pytest.fail(f"LLMQ_REQUIRE_NATIVE is 1, and {', '.join(missing)} is not on this machine")
    if missing:
        pytest.skip(f"{', '.join(missing)} is not on this machine")


def run(*command: str | Path, **options) -> str:
    """Run a command; its output, or a failure that shows it."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, **options)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_library(folder: Path, *options: str) -> Path:
    """Build libllmq_cpu.so in `folder` with CMake, warnings being errors."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run("cmake", *generator, "-S", KERNELS, "-B", folder, "-DLLMQ_WERROR=ON", *options)
    run("cmake", "--build", folder, "--parallel", "2")
    return folder / "libllmq_cpu.so"


def build_wheel(folder: Path, *options: str, **environment: str) -> Path:
    """Build a wheel of a copy of the sources alone, as a fresh checkout has them: `folder`/out/*.whl, of `folder`/source."""
    needs("cmake", "c++")
    if importlib.util.find_spec("scikit_build_core") is None:
        pytest.skip("scikit-build-core is not in this environment")
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.so", "assets", "*.egg-info")
    for tree in ("llmq", "kernels"):
        shutil.copytree(REPO / tree, source / tree, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation", *options)
    run(*pip, "-w", folder / "out", source, env={**os.environ, **environment})
    return folder


def build_driver(folder: Path, compiler: str, *flags: str, source: Path = DRIVER) -> Path:
    """Compile a driver beside the library it is linked to."""
    program = folder / source.stem
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", *flags, f"-I{KERNELS / 'cpu'}"]
    run(*command, source, "-o", program, f"-L{folder}", "-lllmq_cpu", f"-Wl,-rpath,{folder}")
    return program
