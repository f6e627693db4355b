"""Each kernel on the weights of models of 7 and 8 B parameters, as a decode step has them: cold weights, recorded launches.

Times are those by which llmq chooses kernels (`llmq.benchmark.choosing`), so the table shows what it will choose, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import torch

from gpu.findings import Finding
from gpu.formats import TIMED
from llmq.benchmark.choosing import KernelTimer
from llmq.benchmark.random_weights import random_weight
from llmq.numerics.grid import FloatGrid
from llmq.ops.choices import ROWS, fastest_plan
from llmq.ops.schema import Case
from llmq.ops.select import candidates
from llmq.ops.table import REFERENCE

SHAPES = {
    "7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "8B": ((1024, 4096), (14336, 4096), (4096, 14336)),
}
SMALL_SHAPES = {"small": ((256, 512),)}


def time_kernels(device: str, walls: Mapping[str, float], *, small: bool, until: float) -> Iterator[Finding]:
    """Yield a finding for each shape, format, kernel and number of rows.

    Shares are of the copy bandwidth (of the weight, x and y) for up to 16 rows, of the peak of the format's products for more.
    """
    timer = KernelTimer()
    for model, shapes in (SMALL_SHAPES if small else SHAPES).items():
        for n, k in shapes:
            for name, form in TIMED.items():
                what = f"{name}, {n} x {k} ({model})"
                if time.monotonic() > until:
                    yield Finding("kernels", what, "–", note="left out: no time was left")
                    continue
                case = Case(form, n, k, torch.bfloat16, device)
                able = [kernel for kernel, support in candidates(case) if support.ok and kernel.name != REFERENCE]
                times = timer(case, able)
                chosen = fastest_plan(able, times)
                weight = random_weight(case, torch.Generator().manual_seed(0))
                nbytes = sum(tensor.nbytes for tensor in weight.tensors)
                for kernel in able:
                    for rows, seconds in zip(ROWS, times[kernel.name], strict=True):
                        wall, amount = _wall(name, case, nbytes, rows)
                        yield Finding(
                            "kernels",
                            f"{what}, rows: {rows}",
                            kernel.name,
                            seconds * 1e6,
                            "us",
                            wall,
                            amount / seconds / walls[wall] if wall in walls else None,
                            note="chosen" if kernel.name in chosen.kernels else "",
                            more={"gbps": ((nbytes + 2 * rows * (n + k)) / seconds / 1e9, "GB/s")},
                        )


def _wall(name: str, case: Case, nbytes: int, rows: int) -> tuple[str, float]:
    """Return which ceiling stops a product, and how many bytes or operations it is of."""
    if rows <= 16:
        return "copy", nbytes + 2 * rows * (case.n + case.k)
    operations = 2.0 * rows * case.n * case.k
    if case.format.activation is None or isinstance(case.format.weight, FloatGrid):
        return "bf16", operations
    return ("float8" if name.startswith("float8") else "int8"), operations
