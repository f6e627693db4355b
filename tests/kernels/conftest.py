"""Fixtures of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from native_builds import build_wheel

from llmq.ops import native


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
