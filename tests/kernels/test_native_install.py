"""Installing llmq builds the library into the package; without a working compiler it installs without it."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from native_builds import REPO, build_wheel, run

pytestmark = pytest.mark.slow


def files_of_the_wheel(folder: Path) -> list[str]:
    (wheel,) = (folder / "out").glob("llmq-*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_library_lands_in_the_package(plain_wheel):
    names = files_of_the_wheel(plain_wheel)
    assert "llmq/lib/libllmq_cpu.so" in names
    assert "llmq/ops/native.py" in names
    assert not [
        name for name in names if name.startswith("llmq/kernels/") and name.endswith("__init__.py")
    ]  # one would shadow Hugging Face's package of that name
    assert not [name for name in names if name.endswith((".cpp", ".h", "CMakeLists.txt"))]


def test_the_kernels_for_gpus_land_in_the_package(plain_wheel):
    folder = Path(__file__).parents[2] / "kernels" / "triton"
    kernels = {f"llmq/kernels/triton/{path.name}" for path in folder.glob("*.py")}
    assert "llmq/kernels/triton/split.py" in kernels
    assert kernels <= set(files_of_the_wheel(plain_wheel))


def test_the_kernels_for_gpus_are_found_in_an_installed_wheel(plain_wheel, tmp_path):
    pytest.importorskip("triton")
    (wheel,) = (plain_wheel / "out").glob("llmq-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path = [{str(tmp_path)!r}] + [path for path in sys.path if path != {str(REPO)!r}]
from llmq.ops import triton_support
print(triton_support.load("split").__file__)
"""
    assert run(sys.executable, "-c", program, cwd=tmp_path).strip() == str(tmp_path / "llmq" / "kernels" / "triton" / "split.py")


def test_the_templates_of_reports_land_in_the_package(plain_wheel):
    folder = Path(__file__).parent.parent.parent / "llmq" / "results" / "templates"
    templates = {f"llmq/results/templates/{path.name}" for path in folder.iterdir()}
    assert {"llmq/results/templates/report.html.j2", "llmq/results/templates/report.css"} <= templates
    assert templates <= set(files_of_the_wheel(plain_wheel))


def test_without_a_compiler_it_installs_without_the_library(tmp_path):
    names = files_of_the_wheel(build_wheel(tmp_path, CXX="/bin/false"))
    assert "llmq/ops/native.py" in names
    assert not [name for name in names if name.endswith(".so")]
