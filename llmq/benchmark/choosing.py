"""Times of kernels for choosing among them: a few rounds on weights from memory, for each number of rows that counts.

Launched one by one, short kernels take as long as Python takes to launch them. Decode steps are recorded as CUDA graphs, where
nothing waits for Python; so on a GPU calls are timed in a recording, of as many calls as there are copies of the weight. A kernel
that cannot be recorded is timed as it will run: launch by launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmq.benchmark.contender import Contender
from llmq.benchmark.order_statistics import median
from llmq.benchmark.random_weights import random_weight
from llmq.benchmark.timing import Call, TimingPlan, stopwatch_for, time_rounds
from llmq.model.cuda_graph import Capture, CudaCapture
from llmq.ops.choices import ROWS, Times
from llmq.ops.schema import Case, Kernel
from llmq.progress import SILENT, Progress

_TIMING = TimingPlan(repeats=15, warmup=2, budget_s=0.5, min_repeats=3)
"""Of one case and number of rows."""
_LEAST_CALLS = 8
"""Fewest calls in a recording: events tell about half a microsecond."""


class KernelTimer:
    """Measures kernels on random weights; a `choices.Timer`.

    Args:
        progress: is told of every case.
        capture: records calls on a GPU; None: CUDA graphs.
    """

    def __init__(self, progress: Progress = SILENT, capture: Callable[[torch.device], Capture] = CudaCapture) -> None:
        self._progress = progress
        self._capture = capture

    @torch.no_grad()
    def __call__(self, case: Case, kernels: Sequence[Kernel]) -> Times:
        """Return the median seconds of each kernel for each of `ROWS`, all kernels in the same rounds."""
        weight = random_weight(case, torch.Generator().manual_seed(0)).to(case.device)
        contenders = [Contender(kernel, kernel.prepack(weight)) for kernel in kernels]
        times: dict[str, list[float]] = {kernel.name: [] for kernel in kernels}
        with self._progress.task(f"measuring kernels of [{case.n}, {case.k}]", len(ROWS)) as advance:
            for rows in ROWS:
                x = torch.randn(rows, case.k, generator=torch.Generator().manual_seed(rows)).to(case.dtype).to(case.device)
                prepared = {each.kernel.name: self._prepare(each, x, case) for each in contenders}
                calls = {name: call for name, (call, _) in prepared.items()}
                samples = time_rounds(calls, _TIMING, stopwatch=stopwatch_for(case.device))
                for name, (_, products) in prepared.items():
                    times[name].append(median(samples[name]) / products)
                advance(1)
        return times

    def _prepare(self, contender: Contender, x: Tensor, case: Case) -> tuple[Call, int]:
        """Return a call, and how many products it computes."""
        call = contender.call(x, case)
        if case.device != "cuda":
            return call, 1
        products = max(_LEAST_CALLS, contender.copies)

        def several() -> Tensor:
            for _ in range(products - 1):
                call()
            last = call()
            assert isinstance(last, Tensor)
            return last

        try:
            return self._capture(x.device).record(several).replay, products
        except RuntimeError:  # it waits for the device, or allocates: then so does the model's step
            return call, 1
