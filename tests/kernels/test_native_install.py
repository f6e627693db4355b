"""Installing llmq builds the library into the package; without a working compiler it installs without it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from native_builds import needs, run

pytestmark = pytest.mark.slow
REPO = Path(__file__).parents[2]


def wheel_of_a_copy(folder: Path, **environment: str) -> list[str]:
    """Build a wheel of the sources alone, as a fresh checkout has them; the names of its files."""
    needs("cmake", "c++")
    if importlib.util.find_spec("scikit_build_core") is None:
        pytest.skip("scikit-build-core is not in this environment")
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.so", "assets", "*.egg-info")
    for tree in ("llmq", "kernels"):
        shutil.copytree(REPO / tree, source / tree, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", folder / "out", source, env={**os.environ, **environment})
    (wheel,) = (folder / "out").glob("llmq-*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_library_lands_in_the_package(tmp_path):
    names = wheel_of_a_copy(tmp_path)
    assert "llmq/lib/libllmq_cpu.so" in names
    assert "llmq/ops/native.py" in names
    assert "llmq/kernels/__init__.py" not in names  # it would shadow Hugging Face's package of that name
    assert not [name for name in names if name.endswith((".cpp", ".h", "CMakeLists.txt"))]


def test_without_a_compiler_it_installs_without_the_library(tmp_path):
    names = wheel_of_a_copy(tmp_path, CXX="/bin/false")
    assert "llmq/ops/native.py" in names
    assert not [name for name in names if name.endswith(".so")]
