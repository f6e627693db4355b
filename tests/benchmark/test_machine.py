"""The machine's walls: what is moved is counted right, and what is measured is plausible."""

from __future__ import annotations

import psutil
import pytest
import torch

from llmq.benchmark import machine
from llmq.benchmark.machine import (
    Bandwidth,
    default_buffer_sizes,
    measure_bandwidth,
    measure_peak,
    measured_bandwidth,
    measured_peak,
)
from llmq.benchmark.order_statistics import summarize
from llmq.benchmark.timing import TimingPlan
from llmq.errors import UsageError

ONCE = TimingPlan(repeats=2, warmup=1, min_repeats=1)


def test_rates_follow_from_bytes_and_seconds() -> None:
    samples = (0.5, 0.1, 0.2)
    copied = Bandwidth("cuda", 1, "copy", 10**9, 2 * 10**9, summarize(samples), samples)
    assert copied.best_gbps == pytest.approx(20.0)
    assert copied.median_gbps == pytest.approx(10.0)
    assert copied.metrics()["bandwidth_gbps"].samples == pytest.approx([4.0, 20.0, 10.0])


def test_each_way_of_reading_reads_every_element() -> None:
    calls, moves = machine._reads(1 << 20)
    assert moves == 1
    ones = (1 << 20) // 4
    packed = int(torch.ones(2).view(torch.int64).item())  # two fp32 ones as one integer
    assert calls["sum of float32"]() == ones
    assert calls["maximum of int64"]() == packed
    assert int(calls["sum of int64"]()) == (packed * (ones // 2) + (1 << 63)) % (1 << 64) - (1 << 63)  # type: ignore[call-overload]
    assert calls["float32 matrix x vector"]().sum() == ones  # type: ignore[attr-defined]


def test_a_copy_moves_its_buffer_twice() -> None:
    calls, moves = machine._copies(4096, "cpu")
    assert moves == 2
    (copy,) = calls.values()
    assert torch.equal(copy(), torch.ones(1024))  # type: ignore[arg-type]


def test_reading_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 1 << 20)
    found = measure_bandwidth(threads=1, buffer_sizes=(16 << 20, 24 << 20), plan=ONCE)
    assert found.threads == 1
    assert found.moved_bytes == found.buffer_bytes in (16 << 20, 24 << 20)
    assert 0.05 < found.median_gbps <= found.best_gbps < 2000
    assert len(found.samples_s) == 2


def test_the_peak_is_measured() -> None:
    peak = measure_peak(threads=1, size=128, plan=ONCE)
    assert (peak.dtype, peak.size, peak.threads) == ("float32", 128, 1)
    assert 0.01 < peak.best_gflops < 100_000
    assert peak.metrics()["peak_float32"].unit == "GFLOP/s"


def test_what_was_measured_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(machine, "measure_bandwidth", lambda device, threads: calls.append((device, threads)) or object())
    monkeypatch.setattr(
        machine, "measure_peak", lambda device, threads, dtype: calls.append((device, threads, dtype)) or object()
    )
    measured_bandwidth.cache_clear()
    measured_peak.cache_clear()
    try:
        assert measured_bandwidth("cpu", 1) is measured_bandwidth("cpu", 1)
        assert measured_bandwidth("cpu", 1) is not measured_bandwidth("cpu", 2)
        assert measured_peak("cpu", 1) is measured_peak("cpu", 1)
        assert calls == [("cpu", 1), ("cpu", 2), ("cpu", 1, torch.float32)]
    finally:
        measured_bandwidth.cache_clear()
        measured_peak.cache_clear()


def test_buffers_exceed_caches_and_fit_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 100 << 20)
    assert default_buffer_sizes()[0] == 800 << 20
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: None)
    assert default_buffer_sizes()[0] == 256 << 20
    assert len(default_buffer_sizes("cuda")) == 2

    class Little:
        available = 1 << 30

    monkeypatch.setattr(machine.psutil, "virtual_memory", Little)
    assert default_buffer_sizes() == (256 << 20,)


def test_sizes_that_measure_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 32 << 20)
    with pytest.raises(UsageError, match="would be read from the cache of 33554432 bytes"):
        measure_bandwidth(buffer_sizes=(32 << 20,))
    with pytest.raises(UsageError, match="does not fit into"):
        measure_bandwidth(buffer_sizes=(2 * psutil.virtual_memory().total,))
    with pytest.raises(UsageError, match="at least one buffer size"):
        measure_bandwidth(buffer_sizes=())


@pytest.mark.slow
def test_this_machine_reads_faster_with_all_its_memory_than_a_disk() -> None:
    found = measured_bandwidth("cpu", 1)
    assert found.buffer_bytes >= 256 << 20
    assert 0.5 < found.best_gbps < 2000
