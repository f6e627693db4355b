"""Fixtures of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from native_builds import build_library, needs

from llmq.ops import native


@pytest.fixture(scope="session")
def plain_build(tmp_path_factory) -> Path:
    """The folder of a build as users get it."""
    needs("cmake", "c++")
    return build_library(tmp_path_factory.mktemp("plain")).parent


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
