"""GPTQ of one block of Llama-2-7B's widths on the device: Hessians of 16 windows of 2,048 tokens, then seven linears."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from gpu.findings import Finding
from llmq.algorithms.rounding import RoundingOptions, round_linear
from llmq.algorithms.statistics import Statistics
from llmq.calibration.hessian import Hessian
from llmq.numerics.grid import IntGrid

WIDTH, INNER = 4096, 11008


def round_block(device: str, *, small: bool, until: float) -> Iterator[Finding]:
    """Yield the time of the Hessians, that of each linear, and that of the block with the device's peak of memory."""
    width, inner, windows, length = (128, 384, 2, 64) if small else (WIDTH, INNER, 16, 2048)
    if time.monotonic() > until:
        yield Finding("block", "int4-gptq of a block", "–", note="left out: no time was left")
        return
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    grid = IntGrid(4, 128, symmetric=False, zero_point="float", scale_dtype="bfloat16")
    groups = [
        (width, [("q, k, v", 3 * width)]),
        (width, [("o", width)]),
        (width, [("gate", inner), ("up", inner)]),
        (inner, [("down", width)]),
    ]
    total = 0.0
    for k, linears in groups:
        generator = torch.Generator(device).manual_seed(k)
        mixing = torch.randn(k // 8, k, generator=generator, device=device)
        hessian = Hessian()
        started = _now(device)
        for _ in range(windows):  # inputs that go together, as those of a model do
            x = torch.randn(length, k // 8, generator=generator, device=device) @ mixing
            x += torch.randn(length, k, generator=generator, device=device)
            hessian.add(x)
        statistics = Statistics(hessian.value())
        spent = _now(device) - started
        total += spent
        yield Finding("block", f"Hessian of {k} inputs, {windows} x {length} tokens", "torch", spent, "s")
        for name, n in linears:
            weight = torch.randn(n, k, generator=generator, device=device) * 0.02
            started = _now(device)
            _, report = round_linear(weight, statistics, grid, RoundingOptions())
            spent = _now(device) - started
            total += spent
            wrong = report.fallback or ("" if report.loss is not None and report.loss < (report.rtn_loss or 0) else "no better")
            more = {} if report.loss is None or not report.rtn_loss else {"loss_of_rtn": (report.loss / report.rtn_loss, "1")}
            yield Finding("block", f"int4-gptq of {name}: {n} x {k}", "torch", spent, "s", wrong=wrong, more=more)
    more = {}
    if device == "cuda":
        more["peak"] = (torch.cuda.max_memory_allocated() / 1e9, "GB")
    yield Finding("block", f"int4-gptq of a block of {width} and {inner}", "torch", total, "s", more=more)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
