"""Fixtures of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import triton_interpreter
from native_builds import build_wheel

from llmq.ops import native, triton_support


@pytest.fixture(scope="session")
def plain_wheel(made_once) -> Path:
    """The folder of a wheel, of the copy of the sources that it was made of, and of what was compiled; warnings were errors."""
    return made_once("plain-wheel", lambda folder: build_wheel(folder, "-C", "cmake.define.LLMQ_WERROR=ON"))


@pytest.fixture(scope="session")
def plain_build(plain_wheel) -> Path:
    """The folder of a build as users get it."""
    libraries = list((plain_wheel / "source" / "build").rglob("libllmq_cpu.so"))
    assert len(libraries) == 1, "the kernels did not compile without a warning"
    return libraries[0].parent


@pytest.fixture(scope="session")
def native_library() -> None:
    """Skip where the library was not built; with LLMQ_REQUIRE_NATIVE=1, `status` raises instead."""
    status = native.status()
    if isinstance(status, native.Unavailable):
        pytest.skip(status.reason)


@pytest.fixture
def threads():
    """Set torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def triton_device(monkeypatch) -> Iterator[str]:
    """The device on which Triton's kernels run here: a GPU, else the CPU, in the interpreter. Skips where Triton is missing."""
    pytest.importorskip("triton")
    if not triton_support.interpreted():
        if not triton_support.triton_gpu().ok:
            pytest.skip(triton_support.triton_gpu().reason)
        yield "cuda"
        return
    triton_interpreter.repair(monkeypatch)
    with np.errstate(all="ignore"):  # a NaN is not worth a warning
        yield "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter takes its time: leave all that it runs out of the fast part."""
    for item in items:
        if item.path.name.startswith("test_triton_"):
            item.add_marker(pytest.mark.slow)
