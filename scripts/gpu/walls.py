"""The ceilings of a GPU, measured: how fast it copies, and how fast it multiplies two large square matrices of each dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpu.findings import Finding
from llmq.benchmark.timing import TimingPlan, stopwatch_for, time_rounds

PLAN = TimingPlan(repeats=20, warmup=3, budget_s=2.0)


def measure_walls(device: str, *, small: bool) -> list[Finding]:
    """Return the ceilings, in GB/s of bytes read and written, and in 10^12 operations a second.

    Args:
        device: 'cuda', or 'cpu' to try the script.
        small: of sizes that a CPU can do in a moment.
    """
    nbytes, size = (1 << 22, 256) if small else (1 << 30, 8192)
    found = [_rate("copy", "Tensor.copy_", _copy(nbytes, device), 2 * nbytes / 1e9, "GB/s", device)]
    for name, method, product in _products(size, device):
        try:
            found.append(_rate(name, method, product, 2 * size**3 / 1e12, "TOP/s", device))
        except (RuntimeError, NotImplementedError) as error:  # this GPU multiplies no such numbers
            found.append(Finding("walls", name, method, note=str(error).splitlines()[0]))
    return found


def _copy(nbytes: int, device: str) -> Callable[[], Tensor]:
    source = torch.zeros(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def ceilings(findings: list[Finding]) -> dict[str, float]:
    """Return the ceilings by name, in bytes or operations a second."""
    scale = {"GB/s": 1e9, "TOP/s": 1e12}
    return {each.what: each.value * scale[each.unit] for each in findings if each.part == "walls" and each.unit}


def _products(size: int, device: str) -> list[tuple[str, str, Callable[[], Tensor]]]:
    def matrices(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        left, right = (torch.randint(-4, 5, (size, size), device=device).to(dtype) for _ in range(2))
        return left, right.t()  # int8 and float8 products want the second operand by columns

    def plain(dtype: torch.dtype) -> Callable[[], Tensor]:
        left, right = matrices(dtype)
        return lambda: left @ right

    def int8() -> Callable[[], Tensor]:
        left, right = matrices(torch.int8)
        return lambda: torch._int_mm(left, right)  # noqa: SLF001 - what is measured is torch's own product

    def float8() -> Callable[[], Tensor]:
        left, right = matrices(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16)  # noqa: SLF001 - the same

    return [
        ("bf16", "torch.mm", plain(torch.bfloat16)),
        ("fp32", "torch.mm", plain(torch.float32)),
        ("int8", "torch._int_mm", int8()),
        ("float8", "torch._scaled_mm", float8()),
    ]


def _rate(what: str, method: str, call: Callable[[], Tensor], amount: float, unit: str, device: str) -> Finding:
    samples = time_rounds({what: call}, PLAN, stopwatch=stopwatch_for(device))[what]
    return Finding("walls", what, method, amount / min(samples), unit)
