"""Peak memory is that of the block."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llmq.benchmark import memory
from llmq.benchmark.memory import peak_memory, resident_peak_bytes


def test_memory_that_came_and_went_counts() -> None:
    with peak_memory("cpu") as before:
        pass
    with peak_memory("cpu") as during:
        np.ones(512 << 20, dtype=np.uint8)  # much, because the system may take back pages of others meanwhile
    with peak_memory("cpu") as after:
        pass
    assert during.kind == "resident set"
    assert during.nbytes >= before.nbytes + (256 << 20)
    if during.since == "run":
        assert after.nbytes < during.nbytes - (256 << 20)


def test_a_system_that_does_not_let_us_start_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_RESET", tmp_path / "none" / "clear_refs")
    with peak_memory("cpu") as peak:
        pass
    assert peak.since == "process"
    assert peak.nbytes > 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="compares two sources of Linux")
def test_without_proc_the_process_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert resident_peak_bytes() > 1 << 20


def test_a_gpu_is_asked_through_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(f"reset {device}"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: calls.append(f"read {device}") or 12345)
    with peak_memory("cuda:0") as peak:
        calls.append("run")
    assert calls == ["reset cuda:0", "run", "read cuda:0"]
    assert (peak.nbytes, peak.kind, peak.since) == (12345, "allocator", "run")
