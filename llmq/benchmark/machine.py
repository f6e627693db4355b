"""The walls of this machine, measured: how fast memory can be read, and how fast it can multiply.

Decoding one token reads every weight once, so its floor is bytes / bandwidth; a long prompt multiplies each weight with many
rows, so its floor is FLOPs / peak. A figure of llmq's is a share of one of the two. What is measured here is a lower bound
of what the hardware can do (a better loop might read faster), hence the best of several ways of reading is taken, and named.

`measured_bandwidth` and `measured_peak` keep what they measured for the life of the process.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from llmq.benchmark.order_statistics import Summary, summarize
from llmq.benchmark.timing import Call, TimingPlan, stopwatch_for, thread_count, time_rounds
from llmq.errors import UsageError
from llmq.results.environment import last_level_cache_bytes
from llmq.results.record import Metric

_CACHES = 8
"""A buffer of this many last-level caches is read from memory: at most an eighth of it can still be cached."""

_SMALLEST_BUFFER_BYTES, _LARGEST_BUFFER_BYTES = 256 << 20, 2 << 30


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What reading a buffer took, for the fastest way of reading it that was tried."""

    device: str
    threads: int
    method: str
    buffer_bytes: int
    moved_bytes: int
    """Bytes that one repeat moves: the buffer for a read, twice the buffer for a copy."""
    seconds: Summary
    samples_s: tuple[float, ...]

    @property
    def best_gbps(self) -> float:
        """GB/s (10⁹ bytes) of the fastest repeat: the machine's bandwidth, for shares of it."""
        return self.moved_bytes / self.seconds.minimum / 1e9

    @property
    def median_gbps(self) -> float:
        """GB/s of the median repeat: how much of that there was while others ran too."""
        return self.moved_bytes / self.seconds.median / 1e9

    def metrics(self) -> dict[str, Metric]:
        """Return the metrics of a `bandwidth` record."""
        rates = [self.moved_bytes / seconds / 1e9 for seconds in self.samples_s]
        return {
            "bandwidth_gbps": Metric(value=self.best_gbps, unit="GB/s", samples=rates),
            "bandwidth_median_gbps": Metric(value=self.median_gbps, unit="GB/s", stderr=summarize(rates).stderr),
            "buffer_bytes": Metric(value=self.buffer_bytes, unit="bytes"),
        }


@dataclass(frozen=True, slots=True)
class Peak:
    """What a product of two [size, size] matrices took."""

    device: str
    threads: int
    dtype: str
    method: str
    size: int
    seconds: Summary

    @property
    def best_gflops(self) -> float:
        """10⁹ multiplications and additions a second, of the fastest repeat."""
        return 2 * self.size**3 / self.seconds.minimum / 1e9

    def metrics(self) -> dict[str, Metric]:
        """Return the metric of a `bandwidth` record."""
        unit = "GOP/s" if self.dtype == "int8" else "GFLOP/s"
        return {f"peak_{self.dtype}": Metric(value=self.best_gflops, unit=unit)}


@functools.cache
def measured_bandwidth(device: str = "cpu", threads: int | None = None) -> Bandwidth:
    """Return the sequential bandwidth of `device`, measured on the first call, about a second, and kept.

    Args:
        device: "cpu": reads by `threads` threads; "cuda": copies within the device's memory.
        threads: CPU threads that read; None is as many as torch uses.
    """
    return measure_bandwidth(device, threads=threads)


@functools.cache
def measured_peak(device: str = "cpu", threads: int | None = None, dtype: torch.dtype = torch.float32) -> Peak:
    """Return the matrix product rate of `device`, measured on the first call, about a second, and kept."""
    return measure_peak(device, threads=threads, dtype=dtype)


def measure_bandwidth(
    device: str = "cpu",
    *,
    threads: int | None = None,
    buffer_sizes: tuple[int, ...] | None = None,
    plan: TimingPlan | None = None,
) -> Bandwidth:
    """Measure the sequential bandwidth of `device` now: every method on every size, and the fastest of them all.

    Raises:
        UsageError: a buffer would fit into a cache, or not into memory.
    """
    sizes = default_buffer_sizes(device) if buffer_sizes is None else buffer_sizes
    _check_sizes(device, sizes)
    chosen = TimingPlan(repeats=7, warmup=1, budget_s=1.0) if plan is None else plan
    found = []
    with thread_count(threads) as used:
        for size in sizes:
            calls, moves = _copies(size, device) if torch.device(device).type == "cuda" else _reads(size)
            for method, samples in time_rounds(calls, chosen, stopwatch=stopwatch_for(device)).items():
                found.append(Bandwidth(device, used, method, size, moves * size, summarize(samples), tuple(samples)))
            del calls
    return max(found, key=lambda bandwidth: bandwidth.best_gbps)


def measure_peak(
    device: str = "cpu",
    *,
    threads: int | None = None,
    dtype: torch.dtype = torch.float32,
    size: int = 1536,
    plan: TimingPlan | None = None,
) -> Peak:
    """Measure a [size, size] x [size, size] product now; at 1536, three fp32 matrices are 28 MB and 7.2 GFLOP."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    chosen = TimingPlan(repeats=7, warmup=1, budget_s=2.0, min_repeats=2) if plan is None else plan
    with thread_count(threads) as used:
        samples = time_rounds({"matmul": lambda: torch.mm(left, right, out=out)}, chosen, stopwatch=stopwatch_for(device))
    return Peak(device, used, str(dtype).removeprefix("torch."), "torch.mm", size, summarize(samples["matmul"]))


def default_buffer_sizes(device: str = "cpu") -> tuple[int, ...]:
    """Return two buffer sizes that caches cannot hold and memory can, in bytes."""
    if torch.device(device).type == "cuda":
        return (_SMALLEST_BUFFER_BYTES, _LARGEST_BUFFER_BYTES // 2)
    cached = _CACHES * (last_level_cache_bytes() or 0)
    smaller = min(max(cached, _SMALLEST_BUFFER_BYTES), _LARGEST_BUFFER_BYTES)
    room = int(psutil.virtual_memory().available) // 4
    return tuple(size for size in (smaller, 2 * smaller) if size <= room) or (smaller,)


def _check_sizes(device: str, sizes: tuple[int, ...]) -> None:
    if not sizes:
        raise UsageError("measuring bandwidth needs at least one buffer size, got none.")
    if torch.device(device).type != "cpu":
        return
    cache, free = last_level_cache_bytes() or 0, int(psutil.virtual_memory().available)
    for size in sizes:
        if size <= 2 * cache:
            raise UsageError(
                f"a buffer of {size} bytes would be read from the cache of {cache} bytes, not from memory; "
                f"use at least {_CACHES * cache}."
            )
        if size > free:
            raise UsageError(f"a buffer of {size} bytes does not fit into the {free} bytes of free memory; use a smaller one.")


def _reads(size: int) -> tuple[Mapping[str, Call], int]:
    """Return ways of reading `size` bytes once, from first to last, on torch's threads.

    The sums add up every element. The matrix-vector product is what decoding does, its vector stays in the first cache.
    """
    columns = 4096
    matrix = torch.ones(size // (4 * columns), columns)
    integers = matrix.view(torch.int64).reshape(-1)
    vector = torch.ones(columns)
    return {
        "sum of int64": integers.sum,
        "sum of float32": matrix.sum,
        "maximum of int64": integers.amax,
        "float32 matrix x vector": lambda: torch.mv(matrix, vector),
    }, 1


def _copies(size: int, device: str) -> tuple[Mapping[str, Call], int]:
    """Return a copy of `size` bytes within a device's memory: each byte is read once and written once."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return {"copy of float32": lambda: target.copy_(source)}, 2
