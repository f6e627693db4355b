"""Installing llmq builds the library into the package; without a working compiler it installs without it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from native_builds import build_wheel

pytestmark = pytest.mark.slow


def files_of_the_wheel(folder: Path) -> list[str]:
    (wheel,) = (folder / "out").glob("llmq-*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_library_lands_in_the_package(plain_wheel):
    names = files_of_the_wheel(plain_wheel)
    assert "llmq/lib/libllmq_cpu.so" in names
    assert "llmq/ops/native.py" in names
    assert "llmq/kernels/__init__.py" not in names  # it would shadow Hugging Face's package of that name
    assert not [name for name in names if name.endswith((".cpp", ".h", "CMakeLists.txt"))]


def test_without_a_compiler_it_installs_without_the_library(tmp_path):
    names = files_of_the_wheel(build_wheel(tmp_path, CXX="/bin/false"))
    assert "llmq/ops/native.py" in names
    assert not [name for name in names if name.endswith(".so")]
